"""Ops on tensors of any strides and alignment: the bits of contiguous ones."""

import pytest
import torch
from op_helpers import SMALL, every_op, half_and_float, on_cpu_kernels, same_bits

from fastconv.testing import make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def strided(tensor):
    """The same values as every second element of a larger buffer, in each dimension."""
    wide = tensor.new_full([2 * s for s in tensor.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def offset(tensor):
    """The same values at an address that is no multiple of a vector's size."""
    return torch.cat([tensor.new_full((3,), float("nan")), tensor.flatten()])[3:].view(tensor.shape)


LAYOUTS = {
    "nchw": lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1),
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": strided,
    "offset": offset,
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_map": lambda t: t[:, :1, :1].expand_as(t),
    "expanded_all": lambda t: t.flatten()[0].expand_as(t),
}


@every_op
@half_and_float
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_activations(op, dtype, layout):
    inputs = make_inputs(SMALL[op], dtype)
    change = LAYOUTS[layout]
    tensors = {name: change(t) if t.shape[:-1] == inputs.dout.shape[:-1] else t for name, t in inputs.tensors.items()}
    given = inputs._replace(tensors=tensors, dout=change(inputs.dout))
    if (op, layout) == ("squeeze_excite", "nchw"):  # taken as it lies: the bits of the same memory called NCHW
        first = {n: t.permute(0, 3, 1, 2) if t.shape == inputs.dout.shape else t for n, t in tensors.items()}
        nchw = given._replace(tensors=first, dout=given.dout.permute(0, 3, 1, 2), options={"data_format": "NCHW"})
        got, expected = on_cpu_kernels(op, given), on_cpu_kernels(op, nchw)
        assert got["out"].stride() == tensors["x"].stride()
        expected |= {n: expected[n].permute(0, 2, 3, 1) for n in ("out", "dx")}
        return same_bits(got, expected, op)
    dense = {name: t.contiguous() for name, t in tensors.items()}
    same_bits(on_cpu_kernels(op, given), on_cpu_kernels(op, inputs._replace(tensors=dense, dout=given.dout.contiguous())), op)


@every_op
@half_and_float
@pytest.mark.parametrize("change", (strided, offset, lambda t: t.flatten()[0].expand_as(t)), ids=("strided", "offset", "expanded"))
def test_layouts_of_parameters(op, dtype, change):
    inputs = make_inputs(SMALL[op], dtype)
    tensors = {name: t if t.shape[:-1] == inputs.dout.shape[:-1] else change(t) for name, t in inputs.tensors.items()}
    dense = inputs._replace(tensors={name: t.contiguous() for name, t in tensors.items()})
    same_bits(on_cpu_kernels(op, inputs._replace(tensors=tensors)), on_cpu_kernels(op, dense), op)
