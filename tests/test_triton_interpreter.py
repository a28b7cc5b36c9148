"""Run tests/triton_kernel_checks.py in a process whose Triton interprets: the choice is made once, when triton is imported."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

HERE = pathlib.Path(__file__).parent


@pytest.mark.timeout(3600)
def test_kernels_under_the_interpreter(request):
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", str(HERE / "triton_kernel_checks.py")]
    if request.config.getoption("--slow"):
        command.append("--slow")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
