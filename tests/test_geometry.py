"""Launch plans of the CUDA kernels, as the kernels compute them: what holds for every shape, without running one."""

import itertools

import pytest

from fastconv import _C

STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # ConvNeXt-T: H = W, C
SHARED_LIMIT = 99 << 10  # bytes of a block on the GPUs that have least (sm_86, sm_89, sm_120)
GPUS = ((227 << 10, 132), (163 << 10, 108), (SHARED_LIMIT, 84))  # sm_90, sm_80, sm_86: bytes of a block, multiprocessors


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


def joined_shapes():
    for (N, H, W, _, K), C, size in itertools.product(shapes(), (8, 40, 768, 1024), (2, 4)):
        for gpu in GPUS:
            yield (N, H, W, C, K), size, gpu


def test_joined_plans():
    """The norm in the convolution's launch: tiles cover each map once and fit the GPU; no halo takes more than z coming back."""
    joined = 0
    for (N, H, W, C, K), size, (limit, multiprocessors) in joined_shapes():
        images, rows, columns, count, together, threads, shared = _C.cuda_joined_plan(N, H, W, C, K, size, limit, multiprocessors)
        if not count:
            continue
        joined += 1
        down, across, chunks = -(-H // rows), -(-W // columns), -(-C // 32)
        assert columns % 7 == 0 and count == -(-N // images) * down * across and 2 * count >= multiprocessors
        assert images == 1 or (down == across == 1 and images <= N)
        assert (down - 1) * rows < H and (across - 1) * columns < W
        units = images * rows * columns // 7
        assert together <= chunks and together * units * 8 <= threads <= 448 and threads % 32 == 0
        staged = chunks * 32 * 4 + together * (K * K * 36 * 4 + images * (rows + K - 1) * ((columns + K - 1) | 1) * 32 * size)
        z = units * 7 * (-(-C * size // 64) * 64)
        assert max(staged, 8 * 1024) + z == shared <= limit  # the norm's weights take the place of what was staged
        assert (H + (down - 1) * (K - 1)) * (W + (across - 1) * (K - 1)) <= 2.2 * H * W
    assert joined > 1000


def test_what_does_not_join():
    """Rows that are not whole vectors, channels that no warp holds, any K, few tiles, and tiles that do not fit."""
    plenty = (227 << 10, 132)
    assert _C.cuda_joined_plan(128, 14, 14, 384, 7, 2, *plenty)[3] == 128
    for shape in ((128, 14, 14, 380, 7), (128, 7, 7, 1032, 7), (128, 14, 14, 384, 9), (2, 14, 14, 384, 7), (0, 14, 14, 384, 7)):
        assert _C.cuda_joined_plan(*shape, 2, *plenty)[3] == 0, shape
    assert _C.cuda_joined_plan(128, 14, 14, 384, 7, 2, 48 << 10, 132)[3] == 0
    assert _C.cuda_joined_plan(2, 14, 14, 384, 7, 2, 227 << 10, 4)[3] == 2  # enough for a small GPU


@pytest.mark.parametrize(("size", "C"), STAGES)
def test_joined_blocks_fill_an_h200(size, C):
    """At batch 128 in bfloat16: a block for nearly every multiprocessor, and the 14 warps of each that its registers allow."""
    *_, count, together, threads, shared = _C.cuda_joined_plan(128, size, size, C, 7, 2, *GPUS[0])
    blocks = min((228 << 10) // (shared + 1024), 65536 // (128 * threads))
    assert count >= 128 and blocks * threads == 448 and C // 32 % together == 0


@pytest.mark.parametrize(("size", "C"), STAGES)
def test_partials_are_few(size, C):
    """At batch 128: below 5% of the bytes of the backward pass in bfloat16, and a block for nearly each of 132 multiprocessors."""
    shape = (128, size, size, C, 7)
    assert 4 * 2 * _C.cuda_partial_floats(*shape, True) <= 0.05 * _C.depthwise_conv_norm_bwd_bytes(*shape, 2)
    most = 0.055 if size == 7 else 0.05  # 4 partials would be 4.3%, on 96 multiprocessors
    assert 4 * 2 * _C.cuda_partial_floats(*shape, False) <= most * _C.depthwise_conv_bwd_bytes(*shape, 2)
    *_, tiles, slices, norm_slices = _C.cuda_backward_plan(*shape)
    blocks = slices * C // 32
    assert slices <= tiles and norm_slices >= 24
    assert blocks == 120 if size == 7 else blocks % 132 == 0


def test_response_plans():
    """Images held on the chip: by no more blocks than a cluster has, within the shared memory of a block, two of them to a
    multiprocessor or one of twice the threads; in more blocks only where fewer do not do."""
    held = 0
    sizes = ((2, 1), (4, 1), (4, 2), (6, 2), (8, 2))  # bytes kept of an element, sums of a channel
    for L, C, width, (size, sums) in itertools.product((1, 6, 49, 196, 784, 3136), (8, 48, 384, 3072, 10_000), (4, 8), sizes):
        for (limit, _), cluster in itertools.product(GPUS, (1, 16)):
            blocks, threads, shared = _C.cuda_response_plan(L, C, width, size, sums, limit, cluster)
            if not blocks:
                assert L * C * size > cluster * (limit - 16 * 1024 - 12 * sums * (C + 64) - 2 * C * size)
                continue
            held += 1
            assert blocks in (1, 2, 4, 8, 16) and blocks <= cluster and shared <= limit
            assert threads == 512 or (threads == 256 and 2 * shared + 1024 <= limit and blocks <= 8)
            fewer = _C.cuda_response_plan(L, C, width, size, sums, limit, blocks // 2)
            assert fewer[0] == 0 or (threads, fewer[1]) == (256, 512)
            assert shared >= -(-L // blocks) * C * size + 4 * sums * 2 * C + 4 * width * threads
    assert held > 300
    assert _C.cuda_response_plan(49, 384, 1, 2, 1, GPUS[0][0], 16)[0] == 0  # rows that are not whole vectors
    assert _C.cuda_response_plan(49, 384, 8, 2, 1, GPUS[0][0], 0)[0] == 0


def test_response_plans_of_convnextv2_on_an_h200():
    """Tiny in bfloat16: every stage forward, and backward, which holds dy too, from the second on."""
    plans = {
        (size, sums): [_C.cuda_response_plan(H * H, 4 * C, 8, size, sums, GPUS[0][0], 16)[:2] for H, C in STAGES]
        for size, sums in ((2, 1), (4, 2))
    }
    assert plans[2, 1] == [(16, 512), (8, 512), (8, 256), (4, 256)]
    assert plans[4, 2] == [(0, 0), (16, 512), (8, 512), (4, 512)]


def test_every_plan_has_a_partial():
    for shape in ((1, 1, 1, 1, 1), (1, 1, 1, 1, 99), (3, 2, 5, 100_000, 3), (2**20, 1, 1, 1, 7), (1, 2**31, 1, 1, 3), (1, 1, 2**31, 1, 3)):
        *_, tiles, slices, norm_slices = _C.cuda_backward_plan(*shape)
        assert 1 <= slices <= tiles and 1 <= norm_slices <= 512
        assert _C.cuda_partial_floats(*shape, False) == slices * shape[3] * (shape[4] ** 2 + 1)
