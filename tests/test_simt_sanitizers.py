"""The simulator under ASan, UBSan and TSan: silent on right kernels, and naming the line of wrong ones."""

import subprocess
import sys

import pytest
from simt import build

# numpy alone: under TSan it takes a second, torch many.
DRIVER = """
import ctypes, sys
import numpy as np
from simt.control import Simulator
simulator = Simulator(sys.argv[1])
simulator.settings(order=sys.argv[3], workers=int(sys.argv[4])).__enter__()
memory = [np.zeros(64, np.float32), np.zeros(64, np.float32)]
for call in sys.argv[2].split(";"):
    name, *numbers = call.split(",")
    pairs = [(a[0], int(a[1:])) for a in numbers]  # t: address of that tensor, i: an integer
    args = [ctypes.c_void_p(memory[n].ctypes.data) if kind == "t" else ctypes.c_int64(n) for kind, n in pairs]
    code = getattr(simulator.library, "probe_" + name)(*args)
    if code:
        sys.exit(f"{name}: {code} {simulator.message}")
print("clean")
"""
CLEAN = "reverse,t0,t1,i1;reverse_warp,t0,t1,i1;overwrite,t0,t1,i1;one_address,t1,i8,i1;early_exit,t1"


def sanitized(variant, calls, order="forward", workers=1):
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(build.probes(variant)), calls, order, str(workers)],
        env=build.environment(variant),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("variant", ("asan", "tsan"))
def test_sanitizers_are_silent_on_correct_kernels(variant):
    for order, workers in (("forward", 1), ("random", 2)):
        result = sanitized(variant, CLEAN, order, workers)
        assert result.returncode == 0 and "clean" in result.stdout, result.stderr[-4000:]


@pytest.mark.parametrize(
    ("variant", "call", "message"),
    (
        ("asan", "halo,t0,t1,i136", "heap-buffer-overflow"),
        ("tsan", "reverse,t0,t1,i0", "data race"),
        ("tsan", "reverse_warp,t0,t1,i0", "data race"),
        ("tsan", "overwrite,t0,t1,i0", "data race"),
        ("tsan", "one_address,t1,i2,i0", "data race"),
    ),
)
def test_sanitizers_name_the_line(variant, call, message):
    for order in ("forward", "reverse"):
        result = sanitized(variant, call, order)
        assert result.returncode == 66, (result.returncode, result.stderr[-4000:])
        assert message in result.stderr and "probes.cu:" in result.stderr, result.stderr[-4000:]
