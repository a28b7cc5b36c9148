"""grouped_conv at every width of a group that the models of timm have, and the kernels that none of the cases has."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_ops import faults_of

from fastconv.ops import _grouped, grouped_conv
from fastconv.ops._registry import FLOAT_DTYPES
from fastconv.testing import Case, RawCalls, check_op

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)


def case(width: int, K: int, stride: int) -> Case:
    """Three groups, odd sizes, and a padding other than "same"; without a bias where the width is a multiple of 8."""
    return Case("grouped_conv", (2, K + 4, K + 2, 3 * width), K=K, width=width, stride=stride, padding=(K // 2 + 1, 0))._replace(
        without=("bias",) if width % 8 == 0 else ()
    )


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width, stride):
    found = check_op(case(width, 3, stride), torch.float32, "cpu")
    assert found == faults_of(case(width, 3, stride))


@pytest.mark.parametrize("width", (2, 6, 24))
def test_seven_taps(width):
    """In dtypes and strides by turns: all of them are in the next."""
    for dtype, stride in zip((torch.float32, torch.bfloat16, torch.float16), (1, 2, 1)):
        check_op(case(width, 7, stride), dtype, "cpu")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.slow
def test_every_width_dtype_and_kernel(width, dtype):
    for K, stride in itertools.product((1, 3, 5, 7), (1, 2)):
        check_op(case(width, K, stride), dtype, "cpu")


@pytest.mark.parametrize("fwd", (True, False), ids=("ours", "native"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_what_follows_may_work_in_place(fwd, layout, monkeypatch):
    """As ReLU(inplace=True) and `out += shortcut` do."""
    monkeypatch.setattr(_grouped, "passes", lambda *args: _grouped.Passes(fwd, True, True))
    x, shortcut = (torch.randn(2, 12, 5, 6).to(memory_format=layout) for _ in range(2))
    weight, gradients = torch.randn(12, 4, 3, 3), []
    for function in (grouped_conv, F.conv2d):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
        y = function(*leaves, stride=1, padding=1, groups=3)  # a dispatch mode would hide that y is a view, where it is one
        assert y.is_contiguous(memory_format=layout)
        y += shortcut
        y.relu_().square().sum().backward()
        gradients.append((y, *(t.grad for t in leaves)))
        with RawCalls() as recorded:
            function(*leaves, stride=1, padding=1, groups=3).sum().backward()
        assert len(recorded.calls) == (function is grouped_conv) * (1 + fwd)
    for actual, expected in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
