"""Squeeze-and-excitation at the sites of EfficientNet-B0 and RegNetY-032 at 224 x 224 pixels. Eager is what timm runs: the
layers as 1x1 convolutions, in the layout named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_race import compiled, floors, gate, laps

from fastconv import ops, testing

# (H = W, C, R), each shape once.
SITES = {
    "silu": (
        *((112, 32, 8), (56, 96, 4), (56, 144, 6), (28, 144, 6), (28, 240, 10)),
        *((14, 240, 10), (14, 480, 20), (14, 672, 28), (7, 672, 28), (7, 1152, 48)),
    ),
    "relu": ((56, 72, 8), (56, 72, 18), (28, 216, 18), (28, 216, 54), (14, 576, 54), (14, 576, 144), (7, 1512, 144)),
}


def eager(x, w1, b1, w2, b2, act, data_format):
    h = F.conv2d(x.mean((2, 3), keepdim=True), w1[:, :, None, None], b1)
    return x * torch.sigmoid(F.conv2d(getattr(F, act)(h), w2[:, :, None, None], b2))


@pytest.mark.parametrize(("act", "site"), [(act, site) for act, sites in SITES.items() for site in sites], ids=str)
def test_squeeze_excite(act, site, pytestconfig, race, clock, bandwidth):
    option, (size, C, R) = pytestconfig.getoption, site
    if option("--smoke"):
        if site != SITES["silu"][-1]:
            pytest.skip("one site is enough")
        size, C, R = 6, 16, 4
    batch = 2 if option("--smoke") else option("--batch-size") or (128 if clock.cuda else 8)
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    case = testing.Case("squeeze_excite", (batch, size, size, C), act=act, reduced=R, options=(("data_format", "NCHW"),))
    nchw = testing.make_inputs(case, dtype, clock.device)

    def channels_last(t):
        return t.contiguous(memory_format=torch.channels_last)

    nhwc = nchw._replace(tensors={**nchw.tensors, "x": channels_last(nchw.tensors["x"])}, dout=channels_last(nchw.dout))
    fused = ops.squeeze_excite
    for inputs in (nchw, nhwc):
        gate(case, dtype, inputs, {"ours": fused})
    layouts = {"NCHW": nchw, "channels_last": nhwc}
    entrants = {f"eager {layout}": laps(eager, inputs) for layout, inputs in layouts.items()}
    if not option("--no-compile"):
        faster = min(entrants, key=lambda name: min(sum(entrants[name][0](clock).values()) for _ in range(3)))
        compiled_inputs = layouts[faster.removeprefix("eager ")]
        entrants["compile"] = laps(compiled(eager), compiled_inputs)
        entrants["ours + compile"] = laps(compiled(fused), compiled_inputs)
    entrants |= {f"ours {layout}": laps(fused, inputs) for layout, inputs in layouts.items()}
    facts = {
        "op": "squeeze_excite",
        "dtype": str(dtype).removeprefix("torch."),
        "backend": ops.select("squeeze_excite", nchw.tensors["x"]).backend,
    }
    race(f"squeeze_excite {case}", entrants, option("--seconds"), floors(case, dtype, bandwidth), **facts)
