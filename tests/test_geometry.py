"""Launch plans of the CUDA kernels, as the kernels compute them: what holds for every shape, without running one."""

import itertools

import pytest

from fastconv import _C

STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # ConvNeXt-T: H = W, C
SHARED_LIMIT = 99 << 10  # bytes of a block on the GPUs that have least (sm_86, sm_89, sm_120)


def shapes():
    sizes = (1, 2, 3, 6, 7, 8, 13, 14, 15, 20, 21, 28, 29, 57, 200)
    for H, W, K in itertools.product(sizes, sizes, (3, 5, 7)):
        yield from ((N, H, W, 40, K) for N in (1, 3, 70))


def test_tiles_cover_each_map_once():
    for N, H, W, C, K in shapes():
        for images, rows, columns, count, *_ in (
            *(_C.cuda_forward_tiles(N, H, W, C, K, size) for size in (2, 4)),
            _C.cuda_backward_plan(N, H, W, C, K),
        ):
            down, across = -(-H // rows), -(-W // columns)
            assert columns % 7 == 0 and count == -(-N // images) * down * across
            assert images == 1 or (down == across == 1 and images <= N)
            assert (down - 1) * rows < H and (across - 1) * columns < W  # none is empty


def test_tiles_fit_every_gpu():
    """Threads of a block (eight to a run of seven outputs) and its shared memory: weights, sums of dbias, tiles of 32 channels."""

    def staged(images, rows, columns, K, size):
        return images * (rows + K - 1) * ((columns + K - 1) | 1) * 32 * size

    for N, H, W, C, K in shapes():
        weight = (K * K + 1) * 36 * 4
        for size in (2, 4):
            images, rows, columns, _ = _C.cuda_forward_tiles(N, H, W, C, K, size)
            assert images * rows * columns // 7 * 8 <= 448
            assert weight + staged(images, rows, columns, K, size) <= SHARED_LIMIT
        images, rows, columns, *_ = _C.cuda_backward_plan(N, H, W, C, K)
        units = images * rows * columns // 7
        assert units * 8 <= 224
        x = images * rows * (columns | 1) * 32 * 4
        assert weight + (units + 4) * 36 * 4 + staged(images, rows, columns, K, 4) + x <= SHARED_LIMIT
        assert (K * K * 36 + (K * K * (units // K) + units + 4) * 36) * 4 <= SHARED_LIMIT  # sums of dweight, in place of the tiles


@pytest.mark.parametrize(("size", "C"), STAGES)
def test_partials_are_few(size, C):
    """At batch 128: below 5% of the bytes of the backward pass in bfloat16, and blocks enough for 132 multiprocessors."""
    shape = (128, size, size, C, 7)
    partial = 4 * 2 * _C.cuda_partial_floats(*shape, True)
    assert partial <= 0.05 * _C.depthwise_conv_norm_bwd_bytes(*shape, 2)
    assert 4 * 2 * _C.cuda_partial_floats(*shape, False) <= 0.1 * _C.depthwise_conv_bwd_bytes(*shape, 2)
    *_, tiles, slices, norm_slices = _C.cuda_backward_plan(*shape)
    assert slices <= tiles and slices * C // 32 >= 132 and norm_slices >= 24


def test_every_plan_has_a_partial():
    for shape in ((1, 1, 1, 1, 1), (1, 1, 1, 1, 99), (3, 2, 5, 100_000, 3), (2**20, 1, 1, 1, 7), (1, 2**31, 1, 1, 3), (1, 1, 2**31, 1, 3)):
        *_, tiles, slices, norm_slices = _C.cuda_backward_plan(*shape)
        assert 1 <= slices <= tiles and 1 <= norm_slices <= 512
        assert _C.cuda_partial_floats(*shape, False) == slices * shape[3] * (shape[4] ** 2 + 1)
