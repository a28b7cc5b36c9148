"""A block's linear layers by torch's matrix product and by its 1x1 convolution: what ops/_linear.py chooses between."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_race import laps

from fastconv import testing
from fastconv.ops._linear import as_convolution


@pytest.mark.parametrize("widening", (True, False), ids=("C to 4C", "4C to C"))
def test_linear(shape, widening, pytestconfig, race, clock):
    (size, C), option = shape, pytestconfig.getoption
    batch = 2 if option("--smoke") else option("--batch-size") or (128 if clock.cuda else 8)
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    wide, narrow = (C, 4 * C) if widening else (4 * C, C)
    tensors = {
        "x": torch.randn(batch, size, size, wide, dtype=dtype, device=clock.device),
        "weight": torch.randn(narrow, wide, dtype=dtype, device=clock.device) * wide**-0.5,
        "bias": torch.randn(narrow, dtype=dtype, device=clock.device),
    }
    dout = torch.randn(batch, size, size, narrow, dtype=dtype, device=clock.device)
    inputs = testing.Inputs(tensors, {}, dout)
    exact = testing.Inputs({name: t.cpu().double() for name, t in tensors.items()}, {}, dout.cpu().double())
    truth, eager = testing.run(F.linear, exact), testing.run(F.linear, inputs)
    for name, actual in testing.run(as_convolution, inputs).items():
        testing.assert_matches(actual, eager[name], truth[name], grad=name != "out", dtype=dtype, name=name)
    entrants = {"eager channels_last": laps(F.linear, inputs), "as convolution": laps(as_convolution, inputs)}
    facts = {"op": "linear", "dtype": str(dtype).removeprefix("torch.")}
    race(f"linear {batch}x{size}x{size} {wide} to {narrow}", entrants, option("--seconds"), **facts)
