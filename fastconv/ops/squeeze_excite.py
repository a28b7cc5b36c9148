"""Hub of `squeeze_excite`: check, reference, raw ops, Function and public function."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import _registry
from ._checks import check_device, check_float, check_vector, dense, resolve_dtypes, without_autocast
from ._function import first_order_only, needs_grad
from ._layout import in_format, in_layout, in_memory_order, in_nchw

OP = "squeeze_excite"
ACTS = {name: getattr(F, name) for name in ("relu", "silu", "gelu", "hardswish", "leaky_relu")} | {"identity": lambda h: h}
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": lambda z: F.relu6(z + 3) / 6}  # F.hardsigmoid rounds 1/6 to float32 in float64
FUNCTIONS = (*ACTS, *GATES)  # the raw ops take the place of a function in here; csrc/cpu/kernels.h has the same order


def check(x, w1, b1, w2, b2, act, gate, data_format, compute_dtype) -> torch.dtype:
    """Validate the arguments; the dtype of the result."""
    for name, value, known in (("act", act, ACTS), ("gate", gate, GATES), ("data_format", data_format, ("NHWC", "NCHW"))):
        if value not in known:
            raise ValueError(f"{OP}: {name} must be one of {', '.join(known)}, got {value!r}")
    check_float(OP, "x", x)
    check_float(OP, "w1", w1)
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (N, H, W, C) or (N, C, H, W), got {tuple(x.shape)}; add the batch dimension with x[None]")
    C = x.shape[data_format.index("C")]
    R = w1.shape[0] if w2 is not None and w1.dim() else C
    for index, weight, bias, shape in ((1, w1, b1, (R, C)), (2, w2, b2, (C, R))):
        if weight is None:
            if bias is not None:
                raise ValueError(f"{OP}: b2 must be None without w2, got {tuple(bias.shape)}")
            continue
        check_float(OP, f"w{index}", weight)
        if weight.shape not in (shape, (*shape, 1, 1)):
            raise ValueError(
                f"{OP}: w{index} must be {shape} or {(*shape, 1, 1)} with C={C} and R={R}, got {tuple(weight.shape)}; "
                f"x is {data_format}: see data_format="
            )
        check_vector(OP, f"b{index}", bias, shape[0])
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"{OP}: b{index} must have the dtype of w{index} ({weight.dtype}), got {bias.dtype}")
        out_dtype = torch.promote_types(*resolve_dtypes(OP, x, weight, compute_dtype, x.dtype))
    check_device(OP, x, w1=w1, b1=b1, w2=w2, b2=b2)
    return out_dtype


def reference(x, w1, b1=None, w2=None, b2=None, act="relu", gate="sigmoid", data_format="NHWC", compute_dtype=None):
    """Plain PyTorch, in any dtype: the eager backend, and in float64 the truth of the tests."""
    dtype = compute_dtype or x.dtype
    if x.numel() == 0:  # the mean of no pixels is NaN; keep the graph, so that gradients are zeros
        zero = sum(t.sum() * 0 for t in (w1, b1, w2, b2) if t is not None)
        return (x + zero).to(torch.promote_types(x.dtype, dtype))
    with without_autocast(x.device):
        s = x.mean((1, 2) if data_format == "NHWC" else (2, 3)).to(dtype)
        s = F.linear(s, w1.flatten(1).to(dtype), None if b1 is None else b1.to(dtype))
        if w2 is not None:
            s = F.linear(ACTS[act](s), w2.flatten(1).to(dtype), None if b2 is None else b2.to(dtype))
        s = GATES[gate](s)
        return x * (s[:, None, None, :] if data_format == "NHWC" else s[:, :, None, None])


# Raw ops. x is contiguous, (N, H, W, C) with channels_last and (N, C, H, W) without; in backward `in_nchw`. act and
# gate are places in FUNCTIONS; without w2 the first layer is the only one and act is not used. `save` asks for what backward
# needs, in the accumulation dtype: the means (N, C) and what act (N, R) and gate (N, C) are applied to, empty where not needed.
SCHEMAS = {
    "squeeze_excite_fwd": "(Tensor x, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, int act, int gate, ScalarType out_dtype,"
    " bool channels_last, bool save) -> (Tensor y, Tensor pooled, Tensor hidden, Tensor z)",
    "squeeze_excite_bwd": "(Tensor dy, Tensor x, Tensor w1, Tensor? w2, Tensor pooled, Tensor hidden, Tensor z, int act, int gate,"
    " bool channels_last, bool need_dx, bool need_fc1, bool need_fc2) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
}


def _fake_fwd(x, w1, b1, w2, b2, act, gate, out_dtype, channels_last, save):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    N, C = x.shape[0], x.shape[3 if channels_last else 1]
    sizes = ((N, C), (0,) if w2 is None else (N, w1.shape[0]), (N, C)) if save else ((0,),) * 3
    return x.new_empty(x.shape, dtype=out_dtype), *(x.new_empty(size, dtype=acc) for size in sizes)


def _fake_bwd(dy, x, w1, w2, pooled, hidden, z, act, gate, channels_last, need_dx, need_fc1, need_fc2):
    second, need_fc2 = (w1, False) if w2 is None else (w2, need_fc2)
    sizes = (w1, w1.shape if need_fc1 else (0,)), (w1, w1.shape[:1] if need_fc1 else (0,))
    sizes += (second, second.shape if need_fc2 else (0,)), (second, second.shape[:1] if need_fc2 else (0,))
    return x.new_empty(dy.shape if need_dx else (0,)), *(like.new_empty(size) for like, size in sizes)


def _layer_flops(N: int, *weight_shapes) -> int:
    return sum(2 * N * shape[0] * shape[1] for shape in weight_shapes if shape is not None)


def _flops_fwd(x_shape, w1_shape, b1_shape, w2_shape, *args, **kwargs):
    return 2 * math.prod(x_shape) + _layer_flops(x_shape[0], w1_shape, w2_shape)


def _flops_bwd(dy_shape, x_shape, w1_shape, w2_shape, pooled, hidden, z, act, gate, last, need_dx, need_fc1, need_fc2, **kwargs):
    layers = _layer_flops(x_shape[0], w1_shape, w2_shape)
    return (2 + 2 * need_dx) * math.prod(x_shape) + (int(need_dx) + int(need_fc1 or need_fc2)) * layers


_registry.define(
    OP,
    SCHEMAS,
    {"squeeze_excite_fwd": _fake_fwd, "squeeze_excite_bwd": _fake_bwd},
    {"squeeze_excite_fwd": _flops_fwd, "squeeze_excite_bwd": _flops_bwd},
    backends=("cpu", "cuda", "triton"),
)


class SqueezeExcite(torch.autograd.Function):
    """Autograd of squeeze_excite; use the function, which checks and chooses the backend."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, act, gate, data_format, channels_last, out_dtype, backend):
        memory = in_layout(x, data_format, channels_last)
        fwd = _registry.raw("squeeze_excite_fwd", backend)
        y, pooled, hidden, z = fwd(memory, w1, b1, w2, b2, act, gate, out_dtype, channels_last, True)
        ctx.options = act, gate, data_format, channels_last, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w1, w2, pooled, hidden, z, b1, b2)  # biases: for first_order_only
        # As it lies in memory: of a view that a Function returns nobody may change the values, and many a residual sum does.
        return y

    @staticmethod
    @first_order_only(OP)
    def backward(ctx, saved, dy):
        if dy is None:
            return (None,) * 11
        x, *rest = saved[:-2]
        act, gate, data_format, channels_last, backend = ctx.options
        need_dx, need_dw1, need_db1, need_dw2, need_db2 = needed = ctx.needs_input_grad[:5]
        x = in_nchw(x, data_format, channels_last)
        bwd = _registry.raw("squeeze_excite_bwd", backend)
        dx, *grads = bwd(dy.contiguous(), x, *rest, act, gate, channels_last, need_dx, need_dw1 or need_db1, need_dw2 or need_db2)
        grads = in_format(dx, data_format, channels_last) if need_dx else None, *grads
        return *(g if wanted else None for g, wanted in zip(grads, needed)), *(None,) * 6


def squeeze_excite(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor | None,
    b2: torch.Tensor | None,
    act: str = "relu",
    gate: str = "sigmoid",
    data_format: str = "NHWC",
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Squeeze-and-excitation: each channel of an image scaled by a gate computed from the means of all its channels.

    y = x * gate(w2 act(w1 mean_HW(x) + b1) + b2)

    Args:
        x: (N, H, W, C), or (N, C, H, W) by data_format; float32 | bfloat16 | float16 | float64. Dense in either memory
            layout whichever it is called, it costs no copy, and the result has its layout.
        w1, b1: (R, C) or (R, C, 1, 1), as of an nn.Linear or a 1x1 nn.Conv2d, and (R,) or None; x's dtype unless
            compute_dtype is given.
        w2, b2: (C, R) or (C, R, 1, 1), and (C,) or None. With w2 None the first layer, (C, C), is the only one and act
            is left out: the "effective" form.
        act: "relu", "silu", "gelu" (exact), "hardswish", "leaky_relu" (slope 0.01) or "identity".
        gate: "sigmoid", or "hardsigmoid": min(max(z + 3, 0), 6) / 6.
        data_format: "NHWC" or "NCHW", which dimensions of x are which.
        compute_dtype: lowest precision of means, layers and gate; default x.dtype. Under autocast, pass its dtype: x and
            the parameters then keep their own dtypes, and so do their gradients.

    Returns:
        x's shape, in the dtype of PyTorch's promotion over x.dtype and compute_dtype. Means, layers and gate are computed
        in float32 (float64 for float64).

    Raises:
        ValueError: an option, a shape or a device does not fit. TypeError: a dtype does not fit. RuntimeError: a forced
        backend cannot run the call, or a second derivative is asked for.

    Deterministic: equal inputs give equal bits, whatever the number of threads. Keeps x and three vectors an image for
    backward; keeps nothing where no input requires a gradient. The two layouts sum in different orders.

    Source: Hu et al. 2018 (Squeeze-and-Excitation Networks), equations 2 to 4; Lee and Park 2020 (CenterMask), equation 3.
    """
    out_dtype = check(x, w1, b1, w2, b2, act, gate, data_format, compute_dtype)
    backend = _registry.select(OP, x, w1, b1, w2, b2).backend
    if backend in ("eager", "native"):
        return reference(x, w1, b1, w2, b2, act, gate, data_format, compute_dtype)
    return fused(x, w1, b1, w2, b2, act, gate, data_format, out_dtype, backend)


def fused(x, w1, b1, w2, b2, act, gate, data_format, out_dtype, backend) -> torch.Tensor:
    """After `check`, which with cold caches takes longer than many a kernel: patched modules have looked for themselves."""
    options = FUNCTIONS.index(act), FUNCTIONS.index(gate)
    w1, b1, w2, b2 = map(dense, (w1, b1, w2, b2))
    memory, channels_last = in_memory_order(x, data_format)
    if needs_grad(x, w1, b1, w2, b2):
        y = SqueezeExcite.apply(x, w1, b1, w2, b2, *options, data_format, channels_last, out_dtype, backend)
        return in_format(y, data_format, channels_last)
    y = _registry.raw("squeeze_excite_fwd", backend)(memory, w1, b1, w2, b2, *options, out_dtype, channels_last, False)[0]
    return in_format(y, data_format, channels_last)
