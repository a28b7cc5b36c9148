"""The simulator itself: values, poison, thread orders, what it refuses, and its counters against patterns counted by hand."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from simt import build
from simt.control import INVALID_CLUSTER_SIZE, INVALID_CONFIGURATION, INVALID_VALUE, LAUNCH_FAILURE, ORDERS, Simulator

every_order = pytest.mark.parametrize("order", ORDERS)
NAN = float("nan")


@pytest.fixture(scope="module")
def simulator():
    return Simulator(build.probes())


@pytest.fixture
def probe(simulator):
    """Calls probe_<name>: tensors by address, numbers as 64-bit integers. Returns the error code."""

    def call(name, *args):
        values = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in args)
        return getattr(simulator.library, f"probe_{name}")(*values)

    return call


def full(*shape, dtype=torch.float32):
    return torch.full(shape, NAN if dtype.is_floating_point else -1, dtype=dtype)


# --- values


@every_order
@pytest.mark.parametrize(("name", "n"), (("reverse", 64), ("reverse_warp", 32)))
def test_shared_memory_and_barriers(simulator, probe, order, name, n):
    x, y = torch.randn(n), full(n)
    with simulator.settings(order=order):
        assert probe(name, x, y, 1) == 0
    assert torch.equal(y, x.flip(0))


@every_order
@pytest.mark.parametrize(("name", "n"), (("reverse", 64), ("reverse_warp", 32)))
def test_without_the_barrier_nan_shows(simulator, probe, order, name, n):
    y = full(n)
    with simulator.settings(order=order):
        assert probe(name, torch.randn(n), y, 0) == 0
    assert y.isnan().any()


def test_shuffles(probe):
    x, y = torch.randn(32), full(4, 32)
    assert probe("shuffles", x, y) == 0
    lane = torch.arange(32)
    assert torch.equal(y[0], x[lane ^ 5])
    assert torch.equal(y[1], x[torch.where(lane + 3 < 32, lane + 3, lane)])
    assert torch.equal(y[2], x[7].expand(32))
    assert torch.equal(y[3], y[3, :1].expand(32))
    torch.testing.assert_close(y[3, 0], x.sum())


def test_fresh_shared_memory_is_nan(probe):
    y = torch.zeros(64)
    assert probe("fresh", y) == 0
    assert y.isnan().all()


def test_copies_land_at_their_wait(probe):
    x, y = torch.randn(2, 32, 4), full(3, 2, 32, 4)
    assert probe("copies", x, y) == 0
    assert y[0].isnan().all()
    assert torch.equal(y[1, 0], x[0]) and y[1, 1].isnan().all()
    x[1, 1::2] = 0
    assert torch.equal(y[2], x)


def test_small_copies(probe):
    x, y = torch.randn(96), full(96)
    assert probe("small_copies", x, y) == 0
    x[3] = x[42:44] = 0
    assert torch.equal(y, x)


@pytest.mark.parametrize("halves", (0, 1), ids=("m16n8k16", "m16n8k8"))
@pytest.mark.parametrize("by_address", (0, 1), ids=("by the layout", "by ldmatrix"))
@pytest.mark.parametrize(("name", "dtype"), (("bf16", torch.bfloat16), ("fp16", torch.float16)))
def test_mma(probe, name, dtype, by_address, halves):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), full(16, 8)
    assert probe(f"mma_{name}", a, b, c, by_address, halves) == 0
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def test_mma_tf32(probe):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), full(16, 8)
    assert probe("mma_tf32", a, b, c) == 0
    exact = a.double() @ b.double()
    error = (c - exact).abs().max()
    assert 1e-5 < error < 8 * 2**-10 * (a.abs() @ b.abs()).max()  # 10 bits of mantissa, and no more
    a, b = a.mul(8).round() / 8, b.mul(8).round() / 8
    assert probe("mma_tf32", a, b, c) == 0
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-6)


def test_ldmatrix(probe):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = full(2, 7, 32, 2, dtype=torch.int32)
    assert probe("ldmatrix", matrices, out) == 0
    for trans, fragments in enumerate(out):
        source = matrices.mT if trans else matrices
        expected = source.reshape(4, 32, 2).to(torch.int32)  # lane l: row l / 4, columns 2 (l % 4) and the next
        for i, matrix in enumerate((0, 0, 1, 0, 1, 2, 3)):
            assert torch.equal(fragments[i], expected[matrix]), (trans, i)


def test_conversions_round_as_torch_does(probe):
    x = torch.cat([torch.randn(4000) * 10.0 ** torch.randint(-40, 38, (4000,)), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, NAN])])
    n = x.numel()
    bits, back = full(2, n, dtype=torch.int16), full(3, n)
    assert probe("conversions", x, bits, back, n) == 0
    for row, dtype in enumerate((torch.bfloat16, torch.float16)):
        torch.testing.assert_close(bits[row].view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back[row], x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    finite = x.isfinite() & (x.abs() > 1e-37) & (x.abs() < 1e38)
    assert ((back[2] - x)[finite].abs() <= x[finite].abs() * 2**-11).all() and (back[2][finite].view(torch.int32) & 0x1FFF == 0).all()


def test_indices_of_threads_and_blocks(simulator, probe):
    for workers in (1, 2):
        out = full(3 * 2 * 4, 2 * 3 * 5, dtype=torch.int32)
        with simulator.settings(workers=workers):
            assert probe("where", out, 3, 2, 4, 2, 3, 5, 0) == 0
        assert torch.equal(out, torch.arange(24, dtype=torch.int32)[:, None] * 1000 + torch.arange(30, dtype=torch.int32))


def test_only_the_blocks_at_the_ends(simulator, probe):
    for ends in (3, 5, 6, 10, 11):
        out = full(10, 32, dtype=torch.int32)
        with simulator.settings(end_blocks=ends):
            assert probe("where", out, 10, 1, 1, 32, 1, 1, 0) == 0
        assert [block for block in range(10) if (out[block] == -1).all()] == list(range(ends, 10 - ends))
        assert (out[-1] >= 9000).all()


@every_order
def test_clusters(simulator, probe, order):
    x, settings = torch.randn(12, 64), {"order": order, "seed": 1, "cluster": 4}
    weights = torch.arange(1, 5, dtype=torch.float32)[:, None]
    for blocks in (1, 2, 4):
        out = full(12, 64)
        with simulator.settings(**settings):
            assert probe("clusters_that_fit", blocks) and probe("cluster", x, out, 12, blocks, 1, 1) == 0
        sums = (x.flip(1).view(-1, blocks, 64) * weights[:blocks]).sum(1, keepdim=True)
        torch.testing.assert_close(out.view(-1, blocks, 64), sums.expand(-1, blocks, -1))
    with simulator.settings(**settings):
        assert not probe("clusters_that_fit", 8)
        assert probe("cluster", x, out, 16, 8, 1, 1) == INVALID_CLUSTER_SIZE and "the limit is 4" in simulator.message
        assert probe("cluster", x, out, 10, 4, 1, 1) == INVALID_CLUSTER_SIZE and "in a grid of 10" in simulator.message
        assert probe("cluster", x, out, 12, 4, 1, 0) == LAUNCH_FAILURE
        assert "a block exits before it has met those that read its shared memory, thread " in simulator.message
        code = probe("cluster", x, out, 12, 4, 0, 1)
        assert (code == 0 and out.isnan().any()) or "load from a block that has yet to start" in simulator.message


# --- orders


def test_thread_orders(simulator, probe):
    seen = {}
    for name, settings in {
        "forward": {},
        "reverse": {"order": "reverse"},
        "a": {"order": "random"},
        "b": {"order": "random", "seed": 1},
    }.items():
        out = full(2, 64, dtype=torch.int32)
        with simulator.settings(**settings):
            assert probe("order", torch.zeros(1, dtype=torch.int32), out, 64) == 0
        assert (out[0] < 64).all() and (out[1] >= 64).all()  # a barrier is one in every order
        seen[name] = out[0].tolist()
    assert seen["forward"] == list(range(64)) and seen["reverse"] == list(range(63, -1, -1))
    assert sorted(seen["a"]) == sorted(seen["b"]) == seen["forward"]
    assert len(set(map(tuple, seen.values()))) == 4


def test_a_buffer_overwritten_while_it_is_read(simulator, probe):
    x = torch.randn(64)
    for barrier in (0, 1):
        wrong = set()
        for order in ORDERS:
            y = full(64)
            with simulator.settings(order=order):
                assert probe("overwrite", x, y, barrier) == 0
            if not torch.equal(y, x.flip(0)):
                wrong.add(order)
        assert wrong == (set() if barrier else set(ORDERS))


# --- what ends a launch


def test_launch_checks(simulator, probe):
    out = full(70000 * 32, dtype=torch.int32)
    for dims in (
        (0, 1, 1, 32, 1, 1),
        (1, 0, 1, 32, 1, 1),
        (1, 65536, 1, 1, 1, 1),
        (1, 1, 65536, 1, 1, 1),
        (1, 1, 1, 1025, 1, 1),
        (1, 1, 1, 0, 1, 1),
    ):
        assert probe("where", out, *dims, 0) == INVALID_CONFIGURATION, dims
        assert "invalid configuration" in simulator.message
    assert probe("where", out, 1, 1, 1, 1, 1, 128, 0) == INVALID_CONFIGURATION
    assert (out == -1).all()
    assert probe("where", out, 70000, 1, 1, 4, 1, 1, 0) == 0
    assert probe("where", out, 1, 65535, 1, 1, 1, 1, 0) == 0
    assert probe("where", out, 1, 1, 1, 1024, 1, 1, 0) == 0
    assert simulator.message == ""


def test_shared_memory_limit(simulator, probe):
    out = full(64)
    assert probe("limit", out, 163 << 10) == LAUNCH_FAILURE and "static and dynamic shared memory" in simulator.message
    assert probe("limit", out, (163 << 10) + 1) == INVALID_VALUE and "the limit is 166912" in simulator.message
    assert probe("limit", out, (163 << 10) - 4096) == 0
    with simulator.settings(shared_limit=48 << 10):
        assert probe("limit", out, 50 << 10) == INVALID_VALUE


@every_order
def test_faults_of_the_kernel(simulator, probe, order):
    out = full(64)
    expected = {
        "divergent": r"sync_threads at probes.cu:\d+, where another thread is in sync_threads at probes.cu:\d+",
        "deadlock": r"deadlock: threads 0-31 in sync_threads at probes.cu:\d+; threads 32-47 in shuffle_xor at probes.cu:\d+; "
        r"threads 48-63 exited",
        "exited": r"deadlock: .*thread 9 exited|shuffle_xor needs 32 lanes, of which 1 exited",
    }
    for name, pattern in expected.items():
        with simulator.settings(order=order):
            assert probe(name, out) == LAUNCH_FAILURE, name
        message = simulator.message
        if name == "deadlock" and order != "forward":  # whoever exits first may be the first thing noticed
            pattern += r"|shuffle_xor needs 32 lanes, of which \d+ exited"
        assert re.search(pattern, message), message
        assert "[block 0, 0, 0]" in message
    assert probe("early_exit", out) == 0
    assert (out[:40] == 1).all()


def test_copies_in_flight_at_the_exit(simulator, probe):
    assert probe("unwaited", torch.zeros(32), full(32)) == LAUNCH_FAILURE
    assert "a thread exits with cp.async in flight" in simulator.message


def test_accesses_that_cannot_be(simulator, probe):
    messages = ("store outside of shared memory", "store outside of shared memory", "misaligned 16-byte load")
    messages += ("load of shared memory as global", "store outside of shared memory")
    for wrong, message in enumerate(messages):
        assert probe("wrong", full(64), wrong) == LAUNCH_FAILURE
        assert f"{message} at probes.cu:" in simulator.message, simulator.message


def test_a_fault_in_one_of_two_os_threads(simulator, probe):
    with simulator.settings(workers=2):
        for _ in range(5):
            assert probe("deadlock", full(64)) == LAUNCH_FAILURE
            out = full(10, 32, dtype=torch.int32)
            assert probe("where", out, 10, 1, 1, 32, 1, 1, 0) == 0 and (out >= 0).all()


# --- the other side of portable.cuh

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_the_same_source_compiles_for_a_gpu(arch, tmp_path):
    """ptxas takes every instruction that the wrappers name, and shared memory and vectors become what they should."""
    flags = ["-std=c++20", f"-arch={arch}", "--expt-relaxed-constexpr", "-Xcompiler", "-Wall,-Wextra", "--Werror", "all-warnings"]
    folders = [f"-I{folder}" for folder in (build.CSRC, build.CSRC / "cuda")]
    target = tmp_path / "probes.ptx"
    for kind in ("-cubin", "-ptx"):
        command = [NVCC, kind, *flags, *folders, "-o", str(target), str(build.HERE / "probes.cu")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
    ptx = target.read_text()
    for instruction in (
        "ld.global.v4",
        "st.global.v4",
        "ld.shared.v4",
        "st.shared.v4",
        "ld.global.u16|ld.global.b16",
        "bar.sync|barrier.sync",
    ):
        assert re.search(instruction.replace(".", r"\."), ptx), instruction
    assert "st.local" not in ptx and not re.search(
        r"\bld\.(?:v4\.)?[ub]\d+", ptx
    )  # no generic address: each is known to be global or shared


# --- counters, against patterns counted by hand


def counted(simulator, probe, name, *args):
    simulator.counted()
    with simulator.settings(count=True):
        assert probe(name, *args) == 0
    (launch,) = simulator.counted()
    return launch


def reads_and_writes(launch):
    """(distinct, total) sectors of the global reads, and of the writes."""
    result = []
    for use in ("read", "write"):
        total = launch.sum("sectors", space="global", use=use)
        assert launch.sectors[use][:, 1].sum() == total
        result.append((len(launch.sectors[use]), total))
    return result


def test_sectors_of_a_strided_access(simulator, probe):
    x, y = torch.zeros(32 * 8), torch.zeros(32)  # 64-byte aligned, as torch allocates
    assert reads_and_writes(counted(simulator, probe, "strided", x, y, 1)) == [(4, 4), (4, 4)]  # 32 floats: 128 bytes
    assert reads_and_writes(counted(simulator, probe, "strided", x, y, 8)) == [(32, 32), (4, 4)]  # one sector a lane
    assert reads_and_writes(counted(simulator, probe, "strided", x[1:], y, 1))[0] == (5, 5)  # off by 4 bytes: one more
    launch = counted(simulator, probe, "strided", x, y, 1)
    assert (launch.blocks, launch.threads, launch.sum("accesses")) == (1, 32, 2)
    first = x.data_ptr() // 32
    assert sorted(launch.sectors["read"].tolist()) == [[first + i, 1] for i in range(4)]


def test_sectors_read_twice(simulator, probe):
    """Of 1,024 bfloat16 a warp reads 16 sectors at a time, and again with the first value of the next: 17, at the end 16."""
    x, y = torch.zeros(1024, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.bfloat16)
    launch = counted(simulator, probe, "halo", x, y, 1024)
    assert reads_and_writes(launch) == [(64, 4 * 16 + 3 * 17 + 16), (64, 64)]
    assert launch.sum("accesses", use="read") == 8


def test_wavefronts_of_bank_conflicts(simulator, probe):
    """Rows of 32 stores, then 32 reads of a column, whose conflicts depend on the pitch; then 16-byte reads, 8 lanes at a time."""
    for pitch, ways in ((32, 32), (33, 1), (34, 2), (36, 4)):
        launch = counted(simulator, probe, "conflict", torch.zeros(32), pitch)
        assert launch.sum("accesses", space="shared", use="write") == 32
        assert launch.sum("wavefronts", space="shared", use="write") == launch.sum("ideal", space="shared", use="write") == 32
        column, side_by_side, same_banks = sorted(
            (line for line in launch.lines if line[2:4] == ("shared", "read")), key=lambda line: line.line
        )
        assert (column.accesses, column.wavefronts, column.ideal) == (32, 32 * ways, 32)
        assert (side_by_side.accesses, side_by_side.wavefronts, side_by_side.ideal) == (1, 4, 4)
        assert (same_banks.accesses, same_banks.wavefronts, same_banks.ideal) == (1, 32, 4)


def test_mma_and_ldmatrix_calls(simulator, probe):
    a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    launch = counted(simulator, probe, "mma_bf16", a, b, full(16, 8), 1, 0)
    assert (launch.mma, launch.mma_fma, launch.ldmatrix) == (1, 16 * 8 * 16, 2)
    left, right = sorted((line for line in launch.lines if line[2:4] == ("shared", "read")), key=lambda line: line.line)
    assert (left.wavefronts, left.ideal) == (8, 4)  # rows 32 bytes apart: 8 of them meet the banks twice
    assert (right.wavefronts, right.ideal) == (2, 2)  # rows 16 bytes apart
    launch = counted(simulator, probe, "mma_bf16", a, b, full(16, 8), 0, 1)
    assert (launch.mma, launch.mma_fma, launch.ldmatrix) == (2, 16 * 8 * 16, 0)
