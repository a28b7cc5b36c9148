import pytest


@pytest.mark.parametrize("width", (4, 8, 24))
def test_grouped_conv(bench_op, shape, width):
    """3x3 kernels as ResNeXt and RegNet have them, by channels a group. "ours" leaves to torch what the table says."""
    _, C = shape
    bench_op("grouped_conv", shape, K=3, width=min(width, C // 2))
