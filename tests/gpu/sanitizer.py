"""The kernels under compute-sanitizer: `python -m gpu.sanitizer memcheck|racecheck|initcheck`.

Each tool has to find a planted bug first. Where it does not, it does not work on this machine, and what it says is recorded:
the kernels are then neither right nor wrong.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys

import torch

from . import RECORDED, probes

# A probe and its last argument: reads 12 MB past a tensor; races for shared memory; reads what nobody wrote.
PLANTED = {"memcheck": ("strided", 100_000), "racecheck": ("reverse", 0), "initcheck": ("strided", 1)}


def plant(tool: str, library: str) -> None:
    name, argument = PLANTED[tool]
    x, y = torch.empty(64, device="cuda"), torch.empty(64, device="cuda")
    code = getattr(ctypes.CDLL(library), f"probe_{name}")(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(argument)
    )
    torch.cuda.synchronize()
    print(f"probe_{name} returned {code}")


def run_ours() -> None:
    """A few small calls that reach every kernel, the scalar paths and the vector paths."""
    from fastconv import ops, use_backend
    from fastconv.testing import Case, make_inputs, run

    convs = ((1, 8, 14, 32), 7), ((2, 9, 15, 33), 7), ((2, 6, 9, 24), 5), ((2, 5, 6, 17), 3), ((1, 6, 5, 3), 9), ((3, 1, 1, 64), 7)
    cases = [Case(op, shape, K=K) for op in ("depthwise_conv", "depthwise_conv_norm") for shape, K in convs]
    cases += [Case("residual_scale", shape) for shape in ((2, 9, 15, 33), (3, 50, 24), (2, 67, 1030))]
    # Scalars; an image to a block; to a cluster; of float32, and of bfloat16 backward, in two passes.
    cases += [
        Case("global_response_norm", shape, act="gelu") for shape in ((2, 9, 15, 33), (3, 14, 5, 96), (1, 28, 28, 96), (1, 56, 56, 384))
    ]
    for shape, options in itertools.product(
        ((2, 9, 15, 33), (3, 14, 8, 96), (1, 28, 28, 96), (1, 112, 112, 96)), ((), (("data_format", "NCHW"),))
    ):
        cases.append(Case("squeeze_excite", shape, act="silu", reduced=9, options=options))
    calls = [(case, dtype) for case in cases for dtype in (torch.bfloat16, torch.float32)]
    # A patch that is whole, and windows that end inside of one; several warps, passes, and channels in fours.
    windows = ((1, 4, 8, 32), 1, (4, 4)), ((2, 5, 7, 22), 2, (3, 2)), ((1, 13, 25, 64), 2, (12, 12)), ((1, 9, 8, 72), 1, (7, 5))
    calls += [(Case("window_attention", shape, heads=heads, window=w, shift=(1, 1)), torch.bfloat16) for shape, heads, w in windows]
    for case, dtype in calls:
        with use_backend("cuda"):
            run(getattr(ops, case.op), make_inputs(case, dtype, "cuda"))
        torch.cuda.synchronize()
    print(f"{len(calls)} calls ran")


def found(output: str) -> int | None:
    """Errors that the tool counted; None where it reached no summary."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    return int(counts[-1]) if counts else None


def sanitized(executable: str, tool: str, *args: str) -> tuple[int, str]:
    """Exit status and output of this module under a tool, which looks at the kernels of this project."""
    options = ["--tool", tool, "--print-limit", "10"]
    if tool != "initcheck":  # which has to see what torch's kernels write
        options += ["--kernel-name", "kernel_substring=fastconv"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks CUDA questions whose answer may be an error
    command = [executable, *options, sys.executable, "-m", "gpu.sanitizer", *args]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or neighbours in one block look like one tensor
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return result.returncode, result.stdout


def check(tool: str) -> int:
    executable = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if executable is None:
        print("compute-sanitizer was not found (it comes with the CUDA toolkit)")
        return RECORDED
    library = probes.compiled(probes.arch_of_the_gpu())
    _, output = sanitized(executable, tool, "plant", tool, str(library))
    if not found(output):
        print(f"{output[-3000:]}\n{tool} does not find a planted bug here: nothing was checked")
        return RECORDED
    print(f"{tool} finds the planted bug: {found(output)} errors")
    code, output = sanitized(executable, tool, "ours")
    print(output[-6000:])
    return int(code != 0 or found(output) != 0)


def main() -> int:
    command, *args = sys.argv[1:]
    if command == "plant":
        plant(*args)
    elif command == "ours":
        run_ours()
    else:
        return check(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
