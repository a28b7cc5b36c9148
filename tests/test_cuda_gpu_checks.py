"""What `make gpu-check` runs (tests/gpu), as far as it goes without a GPU: the simulator stands in for the hardware, the CPU
kernels for the CUDA ones, scripts for compute-sanitizer."""

import ctypes
import re

import pytest
import torch
from gpu import RECORDED, checks, probes, sanitizer
from gpu.probes import Machine, Seen, difference
from simt import build
from simt.control import SHARED_LIMIT, Simulator

import fastconv
from fastconv import ops
from fastconv.ops import _registry
from fastconv.testing import CASES, dtypes_of


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(scope="module")
def machine():
    simulator = Simulator(build.probes())
    with simulator.settings(cluster=16):
        yield Machine(simulator.library, "cpu", SHARED_LIMIT)


# --- probes


def test_a_machine_is_like_itself(machine):
    assert probes.compare(machine, machine) == ([], [])


@pytest.mark.parametrize("probe", probes.PROBES, ids=lambda probe: probe.__name__)
def test_one_other_bit_is_seen(machine, probe):
    for name, seen in probe(machine).items():
        values = seen.values.clone()
        i = (values == values).flatten().nonzero()[-1]
        if values.dtype == torch.bool:
            values.view(-1)[i] ^= True
        else:
            bits = values.view(probes.INTEGER[values.dtype.itemsize])
            bits.view(-1)[i] ^= 16 if seen.ulps else 1
        message, fault = difference(seen, seen._replace(values=values))
        assert message.startswith(f"1 of {values.numel()} differ, first at {i.item()}: simulator "), (name, message)
        assert fault == seen.judged, name


def test_what_differs_and_what_does_not():
    def of(*bits, **how):
        return Seen(probes.floats_of(torch.tensor(bits)), **how)

    one, zero, minus_zero, infinity, nan, other_nan = 0x3F800000, 0, 0x80000000, 0x7F800000, 0x7FC00000, 0xFFFFFFFF
    assert difference(of(one, nan), of(one, nan)) == ("", False)
    message, fault = difference(of(one, nan), of(one, other_nan))
    assert "payload of a NaN" in message and "0x7fc00000" in message and "0xffffffff" in message and not fault
    assert difference(of(one), of(one + 3, ulps=3))[1]  # the first one's tolerance counts
    assert difference(of(one, ulps=3), of(one + 3)) == ("", False)
    assert difference(of(one, ulps=3), of(one + 4))[1]
    assert difference(of(1, ulps=3), of(minus_zero + 2)) == ("", False)  # across zero
    for a, b in ((zero, minus_zero), (one, nan), (nan, one), (0x7F7FFFFF, infinity)):
        assert difference(of(a), of(b))[1]
    assert difference(of(0x7F7FFFFF, ulps=3), of(infinity))[1] and difference(of(nan, ulps=3), of(one))[1]
    assert difference(of(one), of(one, one))[1]


def test_a_probe_that_fails_does_not_stop_the_next(machine):
    class Broken(Machine):
        def code(self, name, *args):
            return 719 if name in ("shuffles", "ldmatrix") else super().code(name, *args)

    faults, notes = probes.compare(machine, Broken(machine.library, "cpu", SHARED_LIMIT))
    assert faults == ["shuffles: probe_shuffles returned error 719 on cpu", "ldmatrix: probe_ldmatrix returned error 719 on cpu"]
    assert notes == []


def test_conversions_meet_the_hard_values():
    x = probes.hard_floats()
    bits = x.view(torch.int32)
    assert x.isnan().any() and x.isinf().any() and ((x != 0) & (x.abs() < torch.finfo(torch.float32).smallest_normal)).any()
    for dtype in (torch.bfloat16, torch.float16):
        finite = x[(x.abs() < torch.finfo(dtype).max) & (x.abs() >= torch.finfo(dtype).smallest_normal)].double()
        error = (finite.to(dtype).double() - finite).abs()
        ulp = 2.0 ** finite.abs().log2().floor() * torch.finfo(dtype).eps
        assert (error == ulp / 2).sum() > 50_000  # ties
    assert ((bits & 0x1FFF) == 0x1000).sum() > 10_000  # of tf32


class Recording(Machine):
    def __init__(self, *args):
        super().__init__(*args)
        self.names = set()

    def code(self, name, *args):
        self.names.add(name)
        return super().code(name, *args)


def test_every_wrapper_is_probed():
    portable = (build.CSRC / "cuda" / "portable.cuh").read_text()
    gpu_side = portable[portable.index("#include <cuda_runtime.h>") :]
    wrappers = set(re.findall(r"^\s*(?:template\s*<[^;{]*>\s*)?FC_DEVICE\s+[\w<>, ]+?\s(\w+)\(", gpu_side, re.M)) | {
        "launch",
        "launch_clusters",
        "clusters_that_fit",
    }
    assert {
        "sync_warp",
        "from_floats",
        "copy_async",
        "ldmatrix",
        "mma_m16n8k16",
        "mma_m16n8k8",
        "shuffle_down",
        "warp_sum",
        "thread_fence",
    } <= wrappers
    used = {word for path in build.HERE.glob("*probes*") for word in re.findall(r"\w+", path.read_text())}
    assert wrappers - used == {"load_word", "store_word", "shared_address"}  # inside of others


@pytest.mark.skipif(probes.find_nvcc() is None, reason="needs nvcc")
def test_the_probes_compile_for_a_gpu(machine):
    library = ctypes.CDLL(str(probes.compiled("sm_90")))
    recording = Recording(machine.library, "cpu", SHARED_LIMIT)
    probes.compare(recording, recording)
    planted = {name for name, _ in sanitizer.PLANTED.values()}
    assert len(recording.names) > 20
    assert all(hasattr(library, f"probe_{name}") for name in recording.names | planted)
    if not torch.cuda.is_available():
        assert library.probe_widen(None) != 0  # an error of CUDA's, not a crash


# --- checks


def spoilt(right, when):
    """An op whose result is off by a little in some calls."""
    calls = iter(range(10**9))

    def op(*args, **kwargs):
        out = right(*args, **kwargs)
        return out + 2**-5 if when(next(calls), out) else out

    return op


def test_repeat(monkeypatch, capsys):
    options = {"device": "cpu", "backends": ("cpu",), "batch": 2, "stages": ((6, 16),), "runs": 3, "seconds": 60}
    assert checks.repeat(**options) == 0
    assert capsys.readouterr().out.count("equal bits in 3 runs") == 2 * len(checks.own_bits(("cpu",))) > 0
    monkeypatch.setattr(ops, "residual_scale", spoilt(ops.residual_scale, lambda i, out: i == 2))
    assert checks.repeat(**options) == 1
    assert "cpu residual_scale 2x6x6x16 bfloat16: differs in out" in capsys.readouterr().out


def test_huge(monkeypatch, capsys):
    options = {"device": "cpu", "backends": ("cpu",), "elements": 300_000}
    assert checks.huge(**options) == 0
    assert capsys.readouterr().out.count("as one image alone") == len(checks.own_bits(("cpu",))) > 0

    def wrap(right):  # the last image is never written
        def op(x, *args, **kwargs):
            out = right(x, *args, **kwargs)
            return torch.cat([out[:-1], out[1:2]]) if len(x) > 1 else out

        return op

    monkeypatch.setattr(ops, "depthwise_conv", wrap(ops.depthwise_conv))
    assert checks.huge(**options) == 1
    assert "differs in out of the last image" in capsys.readouterr().out


def test_contract_calls():
    calls = list(checks.contract_calls("cuda", checks.BACKENDS))
    ran = {(function.__name__, args[0].op, args[1], args[2]) for function, args in calls}
    for op in CASES:
        for backend in {*checks.BACKENDS} & {*_registry.OPS[op]}:
            assert {("check_op", op, dtype, backend) for dtype in dtypes_of(op, backend)} <= ran
            assert ("check_not_finite", op, torch.bfloat16, backend) in ran
    assert any(0 in args[0].shape for _, args in calls)
    assert checks.attempt((fastconv.testing.check_op, (CASES["residual_scale"][5], torch.float32, "cpu", "cpu"))) == ""
    assert "was asked for and cannot run" in checks.attempt(
        (fastconv.testing.check_op, (CASES["residual_scale"][5], torch.float32, "cuda", "cpu"))
    )


def test_calls_run_in_processes(capsys):
    assert checks.shapes("cpu", ("cpu",), 1, ((6, 16),)) == 0
    assert f"{3 * len(CASES)} of {3 * len(CASES)} calls right" in capsys.readouterr().out
    assert checks.in_processes([(int, ("1",)), (int, ("x",))]) == 1
    assert "int x: ValueError" in capsys.readouterr().out


def test_parity(capsys):
    options = {"device": "cpu", "backends": ("cpu",), "models": ("convnext_atto",), "size": 32}
    assert checks.parity(**options) == 0
    assert capsys.readouterr().out.count("as exact as unpatched") == 2
    with fastconv.disabled():  # the original code would agree with itself
        assert checks.parity(**options) == 1
    assert "differs in what ran" in capsys.readouterr().out


def test_without_a_second_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert checks.second_gpu() == RECORDED and "one GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 40))
    assert checks.huge() == RECORDED and "GiB of memory are free: nothing was run" in capsys.readouterr().out


# --- compute-sanitizer

CLEAN = "========= ERROR SUMMARY: 0 errors"
FOUND = "========= Invalid __global__ read\n========= ERROR SUMMARY: 32 errors"


@pytest.mark.parametrize(
    ("planted", "ours", "status", "message"),
    (
        ((FOUND, 1), (CLEAN, 0), 0, "finds the planted bug: 32 errors"),
        ((FOUND, 1), (FOUND, 0), 1, "Invalid __global__ read"),
        ((FOUND, 1), (CLEAN, 1), 1, "finds the planted bug"),  # the process failed of itself
        ((FOUND, 1), ("Target application crashed", 1), 1, "crashed"),
        ((CLEAN, 0), (CLEAN, 0), RECORDED, "does not find a planted bug here: nothing was checked"),
        (("========= Error: Device not supported", 1), (CLEAN, 0), RECORDED, "Device not supported"),
    ),
)
def test_sanitizer(tmp_path, monkeypatch, capsys, planted, ours, status, message):
    tool = tmp_path / "compute-sanitizer"
    cases = "\n".join(f"*' {name}'*) echo '{output}'; exit {code};;" for name, (output, code) in (("plant", planted), ("ours", ours)))
    tool.write_text(f'#!/bin/sh\ntest "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 9\ncase "$*" in\n{cases}\nesac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(probes, "arch_of_the_gpu", lambda: "sm_90")
    monkeypatch.setattr(probes, "compiled", lambda arch: tmp_path / "probes.so")
    assert sanitizer.check("memcheck") == status
    assert message in capsys.readouterr().out


def test_sanitizer_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    assert sanitizer.check("racecheck") == RECORDED
    assert "was not found" in capsys.readouterr().out


def test_summaries():
    assert sanitizer.found("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)") == 2
    assert sanitizer.found(CLEAN) == 0 and sanitizer.found("Device not supported") is None
