"""Ops as custom operators: opcheck and torch.compile."""

import pytest
import torch
from op_helpers import SMALL, every_op, half_and_float, on_cpu_kernels, same_bits

from fastconv import ops, use_backend
from fastconv.ops._registry import hub
from fastconv.testing import CASES, RawCalls, assert_matches, make_inputs, run, truth_of

pytestmark = pytest.mark.usefixtures("one_thread")


@every_op
@half_and_float
def test_opcheck(op, dtype):
    cases = [SMALL[op], *(c for c in CASES[op] if c.without or 0 in c.shape), *(c for c in CASES[op] if c.wide)]
    seen = set()
    for case in cases:
        inputs = make_inputs(case, dtype)
        with RawCalls() as recorded:
            on_cpu_kernels(op, inputs)
            with torch.no_grad():
                on_cpu_kernels(op, inputs, ())
        for func, args, _ in recorded.calls:
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]  # derivatives are the Function's
            torch.library.opcheck(func, args)
            seen.add(func.__name__.split(".")[0])
    assert seen == set(hub(op).SCHEMAS)


@every_op
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(op, dynamic):
    """One graph forward and backward, the same bits as without compile (to_eager backends run the same kernels)."""
    torch._dynamo.reset()
    inputs = make_inputs(SMALL[op], torch.float32)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend("cpu"):
        got = run(compiled, inputs)
        with torch.no_grad():
            same_bits(run(compiled, inputs, ()), got, op)
    eager = run(hub(op).reference, inputs)
    truth = truth_of(op, inputs)
    for name in truth:
        assert_matches(got[name], eager[name], truth[name], grad=name != "out", dtype=torch.float32, name=name)
    if op != "residual_scale":  # plain PyTorch under compile, by design
        same_bits(got, on_cpu_kernels(op, inputs), op)


def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = make_inputs(SMALL["depthwise_conv_norm"], torch.float32)

    def block(x, weight, bias, norm_weight, norm_bias):
        y = ops.depthwise_conv_norm(x, weight, bias, norm_weight, norm_bias)
        return ops.residual_scale(x, torch.nn.functional.gelu(y), norm_weight)

    with use_backend("cpu"):
        got = run(torch.compile(block, fullgraph=True), inputs)
    with use_backend("eager"):
        eager = run(block, inputs)
        doubles = {name: t.double() for name, t in inputs.tensors.items()}
        truth = run(block, inputs._replace(tensors=doubles, dout=inputs.dout.double()))
    for name in truth:
        assert_matches(got[name], eager[name], truth[name], grad=name != "out", dtype=torch.float32, name=name)
