"""What the benchmarks of the ops share: the shapes, the entrants, the gate before the timing and the floor."""

from __future__ import annotations

import torch
from interleaved import Clock, Lap, compiled

from fastconv import ops, testing
from fastconv.ops._registry import hub

# The four stages of ConvNeXt-T at 224 x 224 pixels, as (H = W, C).
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))
SMOKE = ((6, 16),)
PASSES = ("inference", "forward", "backward")
# Where an NCHW model holds its tensors as NCHW: the rest of a block works on the permuted, channels-last result.
NCHW = {
    "depthwise_conv": ("x", "dout"),
    "depthwise_conv_norm": ("x",),
    "gelu_linear": (),
    "global_response_norm": ("x", "dout"),
    "grouped_conv": ("x", "dout"),
    "residual_scale": ("shortcut", "dout"),
    "squeeze_excite": ("x", "dout"),
    "window_attention": (),
}


def _as_nchw(tensor: torch.Tensor) -> torch.Tensor:
    """The same logical NHWC tensor with the strides of NCHW."""
    return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def relaid(op: str, inputs: testing.Inputs) -> testing.Inputs:
    as_nchw = torch.Tensor.contiguous if op == "grouped_conv" else _as_nchw
    tensors = {name: as_nchw(t) if name in NCHW[op] else t for name, t in inputs.tensors.items()}
    return inputs._replace(tensors=tensors, dout=as_nchw(inputs.dout) if "dout" in NCHW[op] else inputs.dout)


def gate(case: testing.Case, dtype: torch.dtype, inputs: testing.Inputs, entrants: dict) -> None:
    """Assert that each entrant gives the right result and gradients at the very shape that is timed.

    The bound is a multiple of eager's own error; under torch.compile, of the compiled reference's, whose long sums are
    ten times less accurate on a CPU.
    """
    truth = testing.truth_of(case.op, inputs)
    reference = hub(case.op).reference
    for entrant, function in entrants.items():
        eager = testing.run(compiled(reference) if "compile" in entrant else reference, inputs)
        actual = testing.run(function, inputs)
        for name in truth:
            name_in_full = f"{case.op} {case} {entrant}: {name}"
            testing.assert_matches(actual[name], eager[name], truth[name], grad=name != "out", dtype=dtype, name=name_in_full)


def laps(function, inputs: testing.Inputs) -> tuple[Lap, Lap]:
    """Forward and backward of a training step, each timed by itself, and inference: apart, so that neither warms the other's memory."""
    leaves = {n: t if t is None or n in inputs.constant else t.detach().requires_grad_() for n, t in inputs.tensors.items()}
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]

    def training(clock: Clock) -> dict[str, float]:
        out, forward = clock(lambda: function(**leaves, **inputs.options))
        _, backward = clock(lambda: torch.autograd.grad(out, wanted, inputs.dout))
        return {"forward": forward, "backward": backward}

    def inference(clock: Clock) -> dict[str, float]:
        with torch.no_grad():
            return {"inference": clock(lambda: function(**leaves, **inputs.options))[1]}

    return training, inference


def floors(case: testing.Case, dtype: torch.dtype, bandwidth: float) -> dict[str, float]:
    """Milliseconds that the fewest bytes of each pass take at the measured bandwidth; none without the compiled module."""
    try:
        from fastconv import _C
    except ImportError:
        return {}
    size = dtype.itemsize
    if case.op == "gelu_linear":  # bound by its matrix products
        return {}
    if case.op == "grouped_conv":  # as many channels out as in
        return {name: 1e3 * count * torch.Size(case.shape).numel() * size / bandwidth for name, count in zip(PASSES, (2, 2, 3))}
    args = (*case.shape, case.K, size) if case.op.startswith("depthwise_conv") else (torch.Size(case.shape).numel(), size)
    forward, backward = getattr(_C, f"{case.op}_bytes"), getattr(_C, f"{case.op}_bwd_bytes")
    inference = getattr(_C, f"{case.op}_infer_bytes", forward)
    return {name: 1e3 * count(*args) / bandwidth for name, count in zip(PASSES, (inference, forward, backward))}


def race_op(op: str, shape: tuple[int, int], option, race, clock: Clock, bandwidth: float, **changed) -> None:
    size, C = shape
    batch = 2 if option("--smoke") else option("--batch-size") or (128 if clock.cuda else 8)
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    case = testing.Case(op, (batch, size, size, C), **{"K": 7, "act": "gelu" if op == "global_response_norm" else None, **changed})
    inputs = testing.make_inputs(case, dtype, clock.device)
    ours, plain = getattr(ops, op), hub(op).reference
    fused = {"ours": ours} if option("--no-compile") else {"ours": ours, "ours + compile": compiled(ours)}
    gate(case, dtype, inputs, fused)

    entrants = {"eager NCHW": laps(plain, relaid(op, inputs)), "eager channels_last": laps(plain, inputs)}
    if not option("--no-compile"):  # in the layout that is faster without it
        faster = min(entrants, key=lambda name: min(sum(entrants[name][0](clock).values()) for _ in range(3)))
        entrants["compile"] = laps(compiled(plain), relaid(op, inputs) if faster == "eager NCHW" else inputs)
    entrants |= {name: laps(function, inputs) for name, function in fused.items()}
    facts = {"op": op, "dtype": str(dtype).removeprefix("torch."), "backend": ops.select(op, *inputs.tensors.values()).backend}
    race(f"{op} {case}", entrants, option("--seconds"), floors(case, dtype, bandwidth), **facts)
