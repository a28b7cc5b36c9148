"""What the CPU kernels promise beyond the op contract: every SIMD level of this machine, conversions, memory, threads."""

import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest
import torch

from fastconv import ops, use_backend
from fastconv.testing import CASES, Case, make_inputs, run

HERE = pathlib.Path(__file__).parent
LEVELS = ("default", "avx2", "avx512")
HALVES = (torch.bfloat16, torch.float16)


def machine_levels() -> tuple[str, ...]:
    """The levels that this CPU runs, by torch's own detection."""
    best = {"DEFAULT": 1, "AVX2": 2, "AVX512": 3}.get(torch.backends.cpu.get_cpu_capability(), 1)
    return LEVELS[:best]


def in_process(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCONV_", "ATEN_"))}
    return subprocess.run(
        [sys.executable, *arguments], env={**clean, "OMP_NUM_THREADS": "2", **environment}, capture_output=True, text=True, timeout=timeout
    )


def test_the_level_is_the_best_or_the_one_asked_for():
    asked = os.environ.get("FASTCONV_CPU_CAPABILITY")
    assert torch.ops.fastconv.cpu_capability() == (asked or machine_levels()[-1])


@pytest.mark.parametrize("level", machine_levels()[:-1])
def test_every_level_keeps_the_contract(level):
    """The level that this process runs is tested by the test_op*.py; the others run their CPU part in a process each."""
    selection = "test_the_level_is or conversion or rounding or (test_values_and_gradients and cpu) or gradcheck or layouts or nan_and_inf"
    selection += " or linear_wgrad"
    files = [str(HERE / name) for name in ("test_cpu_kernels.py", "test_ops.py", "test_op_layouts.py", "test_linear_wgrad.py")]
    result = in_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, *files, FASTCONV_CPU_CAPABILITY=level)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 350, result.stdout[-500:]
    assert "skipped" not in result.stdout


@pytest.mark.parametrize("level", ("sse9", *(level for level in LEVELS if level not in machine_levels())))
def test_a_level_that_cannot_run_is_refused(level):
    code = "import torch, fastconv; fastconv.ops.depthwise_conv(torch.zeros(1, 4, 4, 8), torch.zeros(8, 1, 3, 3))"
    result = in_process("-c", code, FASTCONV_CPU_CAPABILITY=level)
    assert result.returncode == 1  # an exception, no abort
    assert re.search(rf"FASTCONV_CPU_CAPABILITY must be one of default.*, got {level}", result.stderr), result.stderr


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_conversion_of_every_half_value(dtype):
    """All 65,536 patterns, NaN, Inf and subnormals among them, come through load and store as they are."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 2048, 32)
    with use_backend("cpu"):
        out = ops.residual_scale(torch.zeros_like(values), values, torch.ones(32, dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out[~values.isnan()], values[~values.isnan()])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_half(dtype):
    """Stores round to nearest even as torch does: random bits, and the midpoints between all neighbours."""
    every = torch.arange(0, 2**15).to(torch.int16).view(dtype).float()
    finite = every[torch.isfinite(every)]
    middle = (finite[1:] + finite[:-1]) / 2
    beside = torch.cat([torch.nextafter(middle, torch.tensor(float("inf"))), torch.nextafter(middle, torch.tensor(0.0))])
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=torch.Generator().manual_seed(0), dtype=torch.int64).to(torch.int32)
    values = torch.cat([finite, middle, beside, -middle, bits.view(torch.float32)])
    values = torch.cat([values, torch.zeros(-len(values) % 37)]).view(1, 1, -1, 37)
    weight = torch.ones(37, 1, 1, 1)
    with use_backend("cpu"):
        out = ops.depthwise_conv(values, weight, compute_dtype=dtype, out_dtype=dtype)
    expected = values.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~expected.isnan()], expected[~expected.isnan()])


def test_integers_are_exact():
    """Small integers leave nothing to a tolerance: every backend pass in float32 equals the float64 truth bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for K in (1, 3, 5, 7, 9):
        x, dy = (torch.randint(-4, 5, (2, 17, 13, 21), generator=generator).float() for _ in range(2))
        weight, bias = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((21, 1, K, K), (21,)))
        results = []
        for backend, dtype in (("cpu", torch.float32), ("eager", torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            with use_backend(backend):
                y = ops.depthwise_conv(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
        for ours, truth in zip(*results):
            assert torch.equal(ours.double(), truth)


GUARDED = """
import ctypes, mmap, sys, torch
from fastconv import use_backend
from fastconv.testing import CASES, RawCalls, make_inputs, run
from fastconv import ops
torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE

def guarded(tensor, at_end):
    # a copy that touches an unreadable page: its last byte the page after it, or its first byte the page before it
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    pages = -(-size // PAGE)
    base = libc.mmap(None, (pages + 2) * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(base, PAGE, 0) == 0 and libc.mprotect(base + (pages + 1) * PAGE, PAGE, 0) == 0
    start = base + PAGE + (pages * PAGE - size if at_end else 0)
    buffer = (ctypes.c_char * size).from_address(start)
    copy = torch.frombuffer(buffer, dtype=tensor.dtype).as_strided(tensor.shape, torch.empty_like(tensor).stride())
    return copy.copy_(tensor)

if "overrun" in sys.argv:  # the guard itself works
    ctypes.string_at(guarded(torch.zeros(8), True).data_ptr(), 64)
for op, cases in CASES.items():
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            with use_backend("cpu"), RawCalls() as recorded:
                run(getattr(ops, op), make_inputs(case, dtype))
            for func, args, results in recorded.calls:
                for at_end in (True, False):
                    again = func(*[guarded(a, at_end) if isinstance(a, torch.Tensor) else a for a in args])
                    again = again if isinstance(again, tuple) else (again,)
                    assert all(torch.equal(a, r) for a, r in zip(again, results)), (op, case)
for sizes in ((1, 1, 1), (129, 9, 17), (300, 200, 400)):
    tensors = [torch.randn(sizes[0], columns) for columns in sizes[1:]]
    results = torch.ops.fastconv.linear_wgrad(*tensors, True)
    for at_end in (True, False):
        again = torch.ops.fastconv.linear_wgrad(*(guarded(t, at_end) for t in tensors), True)
        assert all(torch.equal(a, r) for a, r in zip(again, results)), sizes
print("done")
"""


@pytest.mark.parametrize("level", machine_levels())
def test_no_read_outside_the_arguments(level):
    """Each argument in turn ends at, and starts at, a page that must not be touched."""
    result = in_process("-c", GUARDED, FASTCONV_CPU_CAPABILITY=level)
    assert result.returncode == 0 and result.stdout == "done\n", (result.returncode, result.stderr[-2000:])


def test_the_guard_guards():
    assert in_process("-c", GUARDED, "overrun").returncode < 0


def test_concurrent_calls(threads):
    """Several Python threads at once get the bits that one gets alone."""
    threads(2)
    inputs = make_inputs(CASES["depthwise_conv_norm"][2], torch.float32)
    with use_backend("cpu"):
        expected = run(ops.depthwise_conv_norm, inputs)
        wrong = []

        def work():
            for _ in range(20):
                result = run(ops.depthwise_conv_norm, inputs)
                wrong.extend(name for name in expected if not torch.equal(result[name], expected[name]))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


FORK = """
import os, torch
from fastconv import ops, use_backend
from fastconv.testing import CASES, make_inputs, run
inputs = make_inputs(CASES["depthwise_conv"][0], torch.float32)
expected = run(ops.depthwise_conv, inputs)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader's worker does
    result = run(ops.depthwise_conv, inputs)
    os._exit(0 if all(torch.equal(result[name], expected[name]) for name in expected) else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_a_forked_worker_computes():
    result = in_process("-c", FORK, timeout=120)
    assert result.stdout == "done\n", result.stderr[-2000:]


def test_the_cases_reach_every_split():
    """The work splits that need a test of their own, by the plan that the kernels use."""
    import fastconv._C as native

    shapes = {(*case.shape, case.K) for case in CASES["depthwise_conv_norm"] if 0 not in case.shape}
    plans = [native.backward_plan(*shape, -(-shape[3] // 16), True) for shape in shapes]
    assert any(bands > slices for bands, slices, _ in plans), "no case with several bands in one partial sum"
    assert any(slices == 1 for _, slices, _ in plans)
    assert any(groups > 1 for *_, groups in plans)
    assert any(native.forward_bands(*shape, 2)[1] > 1 for shape in shapes), "no case with several bands in one image"
    rows, per_image, count = native.forward_bands(3, 17, 9, 8, 7, 2)
    assert rows * per_image >= 17 > rows * (per_image - 1) and count == 3 * per_image


def test_a_large_map_matches_its_parts():
    """A map that fills many bands and threads, against the same rows computed in a small crop."""
    x = make_inputs(Case("depthwise_conv", (1, 150, 90, 24)), torch.float32).tensors
    with use_backend("cpu"):
        whole = ops.depthwise_conv(**x)
        crop = ops.depthwise_conv(x["x"][:, 60:90], x["weight"], x["bias"])
    assert torch.equal(whole[:, 63:87], crop[:, 3:27])
