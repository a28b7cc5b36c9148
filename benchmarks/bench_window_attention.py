"""Window attention at the four stages of Swin-T at 224 x 224 pixels, of Swin V2-T at 256 and of both B at 384, shifted where the map
is larger than the window. Eager rolls, pads, partitions, attends by batched products and puts the tokens back."""

from __future__ import annotations

import pytest
import torch
from op_race import PASSES, compiled, gate, laps

from fastconv import ops, testing
from fastconv.ops.window_attention import choose, reference

# (H = W, C, window); heads of 32 channels. Swin V2 has cosine attention.
SITES = {
    "swin": ((56, 96, 7), (28, 192, 7), (14, 384, 7), (7, 768, 7)),
    "swinv2": ((64, 96, 8), (32, 192, 8), (16, 384, 8), (8, 768, 8)),
    "swin at 384": ((96, 128, 12), (48, 256, 12), (24, 512, 12), (12, 1024, 12)),
    "swinv2 at 384": ((96, 128, 24), (48, 256, 24), (24, 512, 24), (12, 1024, 12)),
}


def floors(case: testing.Case, dtype: torch.dtype, bandwidth: float) -> dict[str, float]:
    """Milliseconds that qkv and result take, and in the backward pass qkv, its gradient and that of the result."""
    elements = torch.Size(case.shape).numel()
    return {name: 1e3 * count * elements * dtype.itemsize / bandwidth for name, count in zip(PASSES, (4, 4, 7))}


@pytest.mark.parametrize(("model", "site"), [(model, site) for model, sites in SITES.items() for site in sites], ids=str)
def test_window_attention(model, site, pytestconfig, race, clock, bandwidth):
    option, (size, C, window), heads = pytestconfig.getoption, site, site[1] // 32
    if option("--smoke"):
        if site != SITES["swin"][0]:
            pytest.skip("one site is enough")
        size, C, window, heads = 6, 16, 4, 2
    if model.endswith("384") and not clock.cuda:
        pytest.skip("images of 384 pixels: timed on a GPU, where windows of 12 and more have a kernel of their own")
    batch = 2 if option("--smoke") else option("--batch-size") or (128 if clock.cuda else 8)
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    shift = window // 2 if size > window else 0
    without = ("pad_bias",) if model.startswith("swinv2") else ("logit_scale", "pad_bias")
    pairs = {"window": (window, window), "shift": (shift, shift)}
    case = testing.Case("window_attention", (batch, size, size, C), heads=heads, without=without, **pairs)
    inputs = testing.make_inputs(case, dtype, clock.device)
    fused = {"ours": ops.window_attention}
    if not option("--no-compile"):
        fused["ours + compile"] = compiled(ops.window_attention)
    gate(case, dtype, inputs, fused)
    entrants = {"eager channels_last": laps(reference, inputs)}
    if not option("--no-compile"):
        entrants["compile"] = laps(compiled(reference), inputs)
    entrants |= {name: laps(function, inputs) for name, function in fused.items()}
    facts = {
        "op": "window_attention",
        "dtype": str(dtype).removeprefix("torch."),
        "backend": choose(inputs.tensors["qkv"], (), pairs["window"], C // heads, dtype).backend,
    }
    race(f"window_attention {case}", entrants, option("--seconds"), floors(case, dtype, bandwidth), **facts)
