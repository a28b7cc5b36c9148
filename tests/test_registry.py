"""Which backend runs a call, and what is said about it."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

import fastconv
from fastconv import _library, ops
from fastconv.ops import _registry
from fastconv.ops._registry import OPS, hub, missing, select
from fastconv.testing import CASES, RawCalls, make_inputs, run

every_op = pytest.mark.parametrize("op", sorted(OPS))
every_op_on_cuda = pytest.mark.parametrize("op", sorted(op for op in OPS if "cuda" in OPS[op]))


def raw_namespaces(op, inputs):
    with RawCalls() as recorded:
        run(getattr(ops, op), inputs)
    return {func.namespace for func, *_ in recorded.calls}


@every_op
def test_cpu_kernels_are_the_automatic_choice(op):
    assert _library.cpu_missing == ""
    inputs = make_inputs(CASES[op][0], torch.float32)
    assert select(op, *inputs.tensors.values()) == ("cpu", "")
    assert raw_namespaces(op, inputs) == {"fastconv"}


@every_op
def test_eager_says_why(op, monkeypatch):
    tensor = torch.zeros(1)
    monkeypatch.setattr(_library, "cpu_missing", "the CPU library is not built (a remedy)")
    assert select(op, tensor) == ("eager", "cpu: the CPU library is not built (a remedy)")
    assert select(op, tensor.to("meta")) == ("eager", "no kernels for device type meta")
    monkeypatch.setattr(_registry, "_disabled_ops", frozenset([op]))
    assert select(op, tensor) == ("eager", "FASTCONV_DISABLE")


def test_torchs_own_kernels_where_they_are_faster(monkeypatch):
    monkeypatch.setitem(_registry.MIN_CPU_ELEMENTS, "residual_scale", 96)
    small, large = (torch.randn(2, size, 8) for size in (5, 6))
    gamma = torch.randn(8)
    assert select("residual_scale", small, small, gamma, None) == ("native", "")
    with RawCalls() as recorded:
        out = ops.residual_scale(small, small, gamma)
    assert not recorded.calls
    assert torch.equal(out, hub("residual_scale").reference(small, small, gamma))
    assert select("residual_scale", large, large, gamma, None).backend == "cpu"
    assert select("residual_scale", small, small.bfloat16(), gamma, None).backend == "cpu", "torch converts a mixture first"
    with fastconv.use_backend("cpu"):
        assert select("residual_scale", small, small, gamma, None).backend == "cpu"


@every_op_on_cuda
def test_cuda_says_why(op, monkeypatch):
    def reason(device="cuda", dtype=torch.float32):
        return missing(op, "cuda", device, (dtype,))

    assert reason(device="cpu") == "the CUDA C++ kernels need CUDA tensors, got cpu"
    assert reason(dtype=torch.float64) == "float64: the CUDA C++ kernels accumulate in float32"
    monkeypatch.setattr(_library, "cuda_missing", "the CUDA library is not built: a remedy")
    assert reason() == "the CUDA library is not built: a remedy"
    monkeypatch.setattr(_library, "cuda_missing", "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    asked = []
    gpu = types.SimpleNamespace(major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or gpu)
    assert reason(device=torch.device("cuda", 3)) == "the CUDA C++ kernels need compute capability 8.0, the GPU has 7.5"
    assert asked == [torch.device("cuda", 3)]
    for gpu.major in (8, 9, 12):
        assert reason() == ""


class OnCuda:
    """As much of a tensor as the choice looks at, so that it can be read without a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype):
        self.dtype = dtype


@every_op_on_cuda
def test_order_on_cuda(op, monkeypatch):
    """CUDA C++, then Triton, then eager."""
    monkeypatch.setattr(_library, "cuda_missing", "")
    monkeypatch.setattr(_registry, "cuda_missing", lambda device: _library.cuda_missing)  # whatever GPU is here
    monkeypatch.setattr(_registry, "triton_missing", lambda: "")
    assert select(op, OnCuda(torch.float32)) == ("cuda", "")
    assert select(op, OnCuda(torch.float64)) == (
        "eager",
        "cuda: float64: the CUDA C++ kernels accumulate in float32; triton: float64: the Triton kernels accumulate in float32",
    )
    monkeypatch.setattr(_library, "cuda_missing", "the CUDA library is not built: a remedy")
    assert select(op, OnCuda(torch.float32)).backend == "triton"
    monkeypatch.setattr(_registry, "triton_missing", lambda: "triton is not installed (pip install triton)")
    assert select(op, OnCuda(torch.float32)) == (
        "eager",
        "cuda: the CUDA library is not built: a remedy; triton: triton is not installed (pip install triton)",
    )


@every_op
def test_use_backend_forces_or_raises(op):
    inputs = make_inputs(CASES[op][0], torch.float32)
    tensors = inputs.tensors
    with fastconv.use_backend("eager"):
        assert select(op, *tensors.values()) == ("eager", "forced")
        assert raw_namespaces(op, inputs) == set()
        with fastconv.use_backend("cpu"):
            assert raw_namespaces(op, inputs) == {"fastconv"}
        with fastconv.use_backend(None):
            assert select(op, *tensors.values()).backend == "cpu"
        assert select(op, *tensors.values()).backend == "eager"
    for name in ("cuda", *([] if _registry._interpreting else ["triton"])):
        with fastconv.use_backend(name), pytest.raises(RuntimeError, match=f"^{op}: backend '{name}' was asked for and cannot run: "):
            getattr(ops, op)(**tensors, **inputs.options)
    with fastconv.use_backend("cpu"), pytest.raises(RuntimeError, match="the cpu kernels need CPU tensors, got meta"):
        getattr(ops, op)(**{n: t if t is None else t.to("meta") for n, t in tensors.items()}, **inputs.options)
    with pytest.raises(ValueError, match="use_backend: name must be one of cpu, cuda, triton, eager or None, got 'mps'"):
        fastconv.use_backend("mps").__enter__()


@every_op
def test_disabled_runs_the_reference(op):
    inputs = make_inputs(CASES[op][0], torch.float32)
    assert not ops.is_disabled()
    with fastconv.disabled():
        assert ops.is_disabled()
        assert select(op, *inputs.tensors.values()) == ("eager", "fastconv.disabled()")
        assert raw_namespaces(op, inputs) == set()
        with fastconv.use_backend("cpu"):  # the original code wins over any choice of kernels
            assert raw_namespaces(op, inputs) == set()
    assert not ops.is_disabled()
    assert raw_namespaces(op, inputs) == {"fastconv"}


def test_blocks_end_with_an_exception():
    for block in (fastconv.disabled, lambda: fastconv.use_backend("eager")):
        with pytest.raises(KeyError), block():
            raise KeyError
    assert not ops.is_disabled()
    assert select("residual_scale", torch.zeros(1)).backend == "cpu"


def test_meta_tensors_run_the_reference():
    x, weight = torch.zeros(2, 5, 4, 6, device="meta"), torch.zeros(6, 1, 3, 3, device="meta")
    assert ops.depthwise_conv(x, weight).shape == x.shape


SCRIPT = """
import json, torch, fastconv
from fastconv.ops._registry import select
def attempt(op):
    try:
        return list(select(op, torch.zeros(1)))
    except RuntimeError as error:
        return str(error)
print(json.dumps({op: attempt(op) for op in fastconv.ops._registry.OPS}))
"""


def chosen(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCONV_", "TRITON_"))}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env={**clean, **environment}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_environment():
    # one process each: both variables are read once, at import
    got = chosen(FASTCONV_DISABLE="depthwise_conv, residual_scale")
    assert got["depthwise_conv"] == got["residual_scale"] == ["eager", "FASTCONV_DISABLE"]
    assert got["depthwise_conv_norm"] == ["cpu", ""]
    got = chosen(FASTCONV_BACKEND="eager")
    assert all(got[op] == ["eager", "forced"] for op in OPS)
    got = chosen(FASTCONV_BACKEND="triton")
    assert all("backend 'triton' was asked for and cannot run: Triton needs CUDA tensors, got cpu" in got[op] for op in OPS)


@pytest.mark.parametrize("variable", ("FASTCONV_BACKEND", "FASTCONV_DISABLE"))
def test_environment_with_unknown_names(variable):
    """A misspelt switch must not pass for an obeyed one."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTCONV_")}
    result = subprocess.run(
        [sys.executable, "-c", "import torch, fastconv; fastconv.ops.residual_scale(torch.zeros(2, 3), torch.zeros(2, 3))"],
        env={**clean, variable: "depthwise_con"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: ") and variable in message and "'depthwise_con'" in message
    assert ("residual_scale" if variable == "FASTCONV_DISABLE" else "triton") in message  # what it may be
