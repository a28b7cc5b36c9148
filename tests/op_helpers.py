"""What the tests of the op contract share."""

import pytest
import torch

from fastconv import ops, use_backend
from fastconv.ops._registry import OPS
from fastconv.testing import CASES, poisoned, run

BACKENDS = ("eager", "cpu")  # never shortened where the library is not built: such a build must be red
SMALL = {op: next(c for c in cases if not c.without and not c.wide and 1 < c.C < 64) for op, cases in CASES.items()}
GRADIENTS = {
    "depthwise_conv": ("x", "weight", "bias"),
    "depthwise_conv_norm": ("x", "weight", "bias", "norm_weight", "norm_bias"),
    "gelu_linear": ("x", "weight", "bias"),
    "global_response_norm": ("x", "weight", "bias"),
    "grouped_conv": ("x", "weight", "bias"),
    "residual_scale": ("shortcut", "y", "gamma"),
    "squeeze_excite": ("x", "w1", "b1", "w2", "b2"),
    "window_attention": ("qkv", "bias_table", "logit_scale", "pad_bias"),
}
every_op = pytest.mark.parametrize("op", sorted(OPS))
half_and_float = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


def same_bits(left: dict, right: dict, op: str) -> None:
    for name in left.keys() & right.keys():
        if op == "gelu_linear":  # PyTorch's matrix products, whose last bits follow the alignment of what they are given
            torch.testing.assert_close(left[name], right[name], rtol=0.02 if left[name].dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        else:
            assert torch.equal(left[name], right[name]), name


def bound(op, inputs):
    """The op as a function of its tensors alone, in their order or by name."""

    def function(*tensors, **named):
        return getattr(ops, op)(**dict(zip(inputs.tensors, tensors)), **named, **inputs.options)

    return function


def on_cpu_kernels(op, inputs, wanted=None):
    with use_backend("cpu"), poisoned():
        return run(getattr(ops, op), inputs, wanted)
