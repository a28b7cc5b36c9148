"""window_attention beyond the op contract: separate tensors, views, settings, large maps."""

import pytest
import torch
from op_helpers import on_cpu_kernels
from test_ops import lazy_zeros

from fastconv import ops, use_backend
from fastconv.ops import window_attention
from fastconv.ops.window_attention import reference
from fastconv.testing import Case, RawCalls, assert_matches, make_inputs

CASE = Case("window_attention", (2, 5, 7, 24), heads=2, window=(3, 4), shift=(1, 2))


def gradients(y, tensors, dy):
    return y.detach(), *torch.autograd.grad(y, tensors, dy)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_separate_tensors_give_the_bits_of_packed_ones(dtype):
    inputs = make_inputs(CASE, dtype)
    packed = on_cpu_kernels("window_attention", inputs)
    parts = [t.contiguous().requires_grad_() for t in inputs.tensors["qkv"].unbind(3)]
    others = {name: t for name, t in inputs.tensors.items() if name != "qkv"}
    with use_backend("cpu"):
        y, *grads = gradients(window_attention(tuple(parts), **others, **inputs.options), parts, inputs.dout)
        parts[1].requires_grad_(False)
        (dv,) = torch.autograd.grad(window_attention(tuple(parts), **others, **inputs.options), parts[2:], inputs.dout)
    assert torch.equal(y, packed["out"]) and torch.equal(torch.stack(grads, 3), packed["dqkv"]) and torch.equal(dv, grads[2])


def test_views_are_read_where_they_lie():
    """Of a wider linear layer, or of a map whose images lie apart: the raw op gets the caller's memory."""
    inputs = make_inputs(CASE, torch.float32)
    qkv = inputs.tensors["qkv"]
    wide = torch.full((2, 9, 7, 3 * 24 + 5), float("nan"))
    view = wide[:, 2:7, :, 5:].unflatten(3, (3, 2, 12)).copy_(qkv)
    expected = on_cpu_kernels("window_attention", inputs)
    with RawCalls() as recorded:
        got = on_cpu_kernels("window_attention", inputs._replace(tensors={**inputs.tensors, "qkv": view}))
    for name, values in expected.items():
        assert torch.equal(got[name], values), name
    for func, args, _ in recorded.calls:
        pointers = [t.data_ptr() for t in args[1 if "bwd" in func.__name__ else 0 :][:3]]
        assert pointers == [view.select(3, i).data_ptr() for i in range(3)]


@pytest.mark.parametrize("options", ({"scale": 0.7}, {"mask_value": -3.0}, {"mask_value": 0.0}), ids=str)
def test_settings(options):
    case = CASE._replace(without=("logit_scale",), scale=1.0)
    inputs = make_inputs(case, torch.float32)
    tensors = {name: t for name, t in inputs.tensors.items() if t is not None}
    results = []
    for function, dtype in ((window_attention, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        with use_backend("cpu"):
            y = function(**leaves, **inputs.options, **options)
        results.append(gradients(y, list(leaves.values()), inputs.dout.to(dtype)))
    for i, (ours, eager, truth) in enumerate(zip(*results)):
        assert_matches(ours, eager, truth, grad=i > 0, dtype=torch.float32)
    with use_backend("cpu"):
        assert not torch.allclose(results[0][0], window_attention(**tensors, **inputs.options), atol=1e-3)


@pytest.mark.parametrize("shape", ((2,), (2, 1, 1)))
def test_logit_scale_of_either_shape(shape):
    inputs = make_inputs(CASE, torch.float32)
    factor = inputs.tensors["logit_scale"].view(shape)
    got = on_cpu_kernels("window_attention", inputs._replace(tensors={**inputs.tensors, "logit_scale": factor}))
    expected = on_cpu_kernels("window_attention", inputs)
    assert got["dlogit_scale"].shape == shape
    assert torch.equal(got["dlogit_scale"].flatten(), expected["dlogit_scale"]) and torch.equal(got["out"], expected["out"])


def test_a_token_of_zeros_has_a_gradient():
    """F.normalize divides by at least 1e-12: a zero token stays one, and its gradient is finite."""
    inputs = make_inputs(CASE._replace(shift=(0, 0)), torch.float64)
    inputs.tensors["qkv"][0, 1, 2] = 0
    got = on_cpu_kernels("window_attention", inputs)
    leaf = inputs.tensors["qkv"].requires_grad_()
    y = reference(leaf, **{name: t for name, t in inputs.tensors.items() if name != "qkv"}, **inputs.options)
    (expected,) = torch.autograd.grad(y, leaf, inputs.dout)
    torch.testing.assert_close(got["dqkv"], expected, rtol=1e-9, atol=1e-9)
    assert expected[0, 1, 2, 0].abs().max() > 1e6


def test_nothing_of_the_size_of_the_weights_is_kept():
    inputs = make_inputs(CASE._replace(shape=(2, 14, 14, 32), window=(7, 7)), torch.float32)
    kept = set()

    def pack(tensor):
        kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    leaves = {name: t.requires_grad_() for name, t in inputs.tensors.items()}
    with use_backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = window_attention(**leaves, **inputs.options)
    assert sum(size for _, size in kept) == sum(t.nbytes for t in leaves.values())
    assert y.grad_fn is not None


@pytest.mark.slow
def test_more_than_2_31_elements():
    """Offsets past int32: only the last window holds values, and so does the result."""
    H, W, heads, D = 9500, 9500, 1, 8
    qkv = lazy_zeros(1, H, W, 3 * heads * D).unflatten(3, (3, heads, D))
    assert qkv.numel() > 2**31
    corner = make_inputs(Case("window_attention", (1, 10, 10, heads * D), heads=heads), torch.bfloat16).tensors["qkv"]
    qkv[:, -10:, -10:] = corner
    with use_backend("cpu"), torch.no_grad():
        y = ops.window_attention(qkv, (10, 10))
        expected = ops.window_attention(corner, (10, 10))
    assert torch.equal(y[:, -10:, -10:], expected) and expected.any()
    assert not y[:, -20:-10].any() and not y[:, :10].any()
