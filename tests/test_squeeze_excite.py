"""squeeze_excite beyond the op contract: large maps, wide layers, layouts."""

import pytest
import torch
from op_helpers import on_cpu_kernels
from test_ops import lazy_zeros

from fastconv import ops, use_backend
from fastconv.testing import Case, RawCalls, check_op, make_inputs


@pytest.mark.parametrize("C, reduced", ((8, 1), (8, 8), (4096, 1), (4096, 300)))
@pytest.mark.parametrize("data_format", ("NHWC", "NCHW"))
def test_widths(C, reduced, data_format):
    case = Case("squeeze_excite", (2, 3, 2, C), act="silu", reduced=reduced, options=(("data_format", data_format),))
    check_op(case, torch.float32, "cpu")


@pytest.mark.parametrize("channels_last", (True, False))
def test_means_of_a_large_map(channels_last):
    """Half a million pixels around 1: sums one after the other would be off by thousands of units of roundoff."""
    x = 1 + torch.randn(1, 720, 730, 3, generator=torch.Generator().manual_seed(0)) / 4
    x = x if channels_last else x.permute(0, 3, 1, 2).contiguous()
    w = torch.eye(3)
    _, pooled, *_ = torch.ops.fastconv.squeeze_excite_fwd(x, w, None, None, None, 5, 6, torch.float32, channels_last, True)
    truth = x.double().mean((1, 2) if channels_last else (2, 3))
    assert ((pooled - truth) / truth).abs().max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("data_format", ("NHWC", "NCHW"))
@pytest.mark.parametrize("turned", (False, True))
def test_no_layout_is_copied(data_format, turned):
    """The raw op gets the caller's memory, and the result has the layout of x."""
    inputs = make_inputs(Case("squeeze_excite", (2, 5, 4, 12), options=(("data_format", data_format),)), torch.float32)
    x = inputs.tensors["x"]
    if turned:
        axes = (-1, 1) if data_format == "NHWC" else (1, -1)
        x = x.movedim(*axes).contiguous().movedim(*axes[::-1])
    with RawCalls() as recorded:
        result = on_cpu_kernels("squeeze_excite", inputs._replace(tensors={**inputs.tensors, "x": x}))
    assert {call[1][0 if "fwd" in str(call[0]) else 1].data_ptr() for call in recorded.calls} == {x.data_ptr()}
    assert result["out"].stride() == result["dx"].stride() == x.stride()


@pytest.mark.parametrize("data_format", ("NHWC", "NCHW"))
@pytest.mark.parametrize("turned", (False, True))
def test_what_follows_may_work_in_place(data_format, turned):
    """As the `x += shortcut` of a residual block does."""
    inputs = make_inputs(Case("squeeze_excite", (2, 5, 4, 12), options=(("data_format", data_format),)), torch.float32)
    if turned:
        axes = (-1, 1) if data_format == "NHWC" else (1, -1)
        x = inputs.tensors["x"].movedim(*axes).contiguous().movedim(*axes[::-1])
        inputs = inputs._replace(tensors={**inputs.tensors, "x": x})
    leaves = [t.requires_grad_() for t in inputs.tensors.values()]
    with use_backend("cpu"):
        results = []
        for add in (torch.Tensor.add_, torch.Tensor.add):
            out = add(ops.squeeze_excite(**inputs.tensors, **inputs.options), 1)
            results.append((out, *torch.autograd.grad(out, leaves, inputs.dout)))
    for in_place, expected in zip(*results):
        assert torch.equal(in_place, expected)


@pytest.mark.slow
@pytest.mark.parametrize("data_format", ("NHWC", "NCHW"))
def test_more_than_2_31_elements(data_format):
    """Offsets past int32: only the last values of the memory differ from zero, and so does the result."""
    shape = (1, 16400, 8200, 16) if data_format == "NHWC" else (1, 16, 16400, 8200)
    x = lazy_zeros(*shape)
    x.view(-1)[-16:] = 1
    w = torch.zeros(16, 16, dtype=torch.bfloat16)
    with use_backend("cpu"), torch.no_grad():
        y = ops.squeeze_excite(x, w, None, None, None, data_format=data_format)
    assert torch.equal(y.view(-1)[-16:], torch.full((16,), 0.5, dtype=torch.bfloat16))
    assert not y.view(-1)[-1000:-16].any() and not y.view(-1)[:1000].any()
