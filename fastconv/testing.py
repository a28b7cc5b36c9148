"""The contract that every backend of every op is held to: cases, inputs, the tolerance rule, `check_op` and `check_not_finite`.

Tests, benchmarks and ahead-of-time compilation all take their cases from here. No test framework is imported.

    for case in CASES["depthwise_conv"]:
        check_op(case, torch.float32, "triton", device="cuda")
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from . import ops
from ._attention_cases import attention_formula, attention_inputs
from ._cases import CASES as CASES
from ._cases import Case as Case
from ._cases import dtypes_of as dtypes_of
from .ops._registry import FLOAT_DTYPES as FLOAT_DTYPES
from .ops._registry import NAMESPACES, hub, select, use_backend

# Absolute part of the bound, relative to rms(truth): about 8 units of roundoff of a stored result. The maximum gets 4x.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FACTOR_OUTPUT, FACTOR_GRADIENT, FACTOR_MAXIMUM = 2, 3, 4


class Inputs(NamedTuple):
    tensors: dict[str, torch.Tensor | None]  # by argument name
    options: dict  # keyword arguments that are not tensors
    dout: torch.Tensor  # gradient of the result
    constant: tuple[str, ...] = ()  # tensors that get no gradient
    dshortcut: torch.Tensor | None = None  # gradient of the second result, x itself, where there is one


def make_inputs(case: Case, dtype: torch.dtype, device="cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case: the same numbers on every device, and up to rounding in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def randn(name: str, *shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor | None:
        values = mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)
        return None if name in case.without else values.to(device, _dtype_of(case, name, dtype))

    if case.op == "residual_scale":
        N, C = case.shape[0], case.C
        mask_shape = [1 if case.mask == "one" else N] + [1] * (len(case.shape) - 1)
        tensors = {
            "shortcut": randn("shortcut", *case.shape),
            "y": randn("y", *case.shape),
            "gamma": randn("gamma", C, mean=0.5),
            "mask": randn("mask", *mask_shape, mean=1.5, std=0.25),
        }
        if tensors["mask"] is not None and N > 1 and case.mask == "image":
            tensors["mask"][0] = 0  # a dropped image
        out_dtype = hub(case.op).out_dtype(**tensors)
        return Inputs(tensors, {}, randn("dout", *case.shape).to(out_dtype), constant=("mask",))
    if case.op == "squeeze_excite":
        return _gate_inputs(case, dtype, randn)
    if case.op == "window_attention":
        return Inputs(*attention_inputs(case, dtype, randn))
    C, K = case.C, case.K
    if case.op == "global_response_norm":
        tensors = {"x": randn("x", *case.shape, std=case.scale), "weight": randn("weight", C), "bias": randn("bias", C, std=case.scale)}
        if C > 9 and case.shape[0]:  # not in the small cases, for numerical differentiation
            tensors["x"][-1, ..., 0] = 0  # a norm without derivative
        out_dtype = _dtype_of(case, "out", dtype)
        options = ({"act": case.act} if case.act else {}) | ({"out_dtype": out_dtype} if case.wide else {})
        return Inputs(tensors, options, randn("dout", *case.shape, std=min(1, 1 / case.scale)).to(out_dtype))
    if case.op == "gelu_linear":
        features = C // 2 + 3
        tensors = {
            "x": randn("x", *case.shape, std=case.scale),
            "weight": randn("weight", features, C, std=C**-0.5),
            "bias": randn("bias", features),
        }
        options = ({"approximate": "tanh"} if case.act else {}) | ({"compute_dtype": dtype} if case.wide else {})
        return Inputs(tensors, options, randn("dout", *case.shape[:-1], features).to(dtype))
    if case.op == "grouped_conv":
        width, out = C // case.groups, case.out or C
        options = {"stride": case.stride, "padding": K // 2 if case.padding is None else case.padding, "groups": case.groups}
        tensors = {
            "x": randn("x", *case.shape, std=case.scale).permute(0, 3, 1, 2),
            "weight": randn("weight", out, width, K, K, std=(K * width**0.5) ** -1),
            "bias": randn("bias", out),
        }
        shape = hub(case.op).check(tensors["x"].to(dtype), tensors["weight"].to(dtype), **options).out
        return Inputs(tensors, options | ({"compute_dtype": dtype} if case.wide else {}), randn("dout", *shape).to(dtype))
    tensors = {
        "x": randn("x", *case.shape, std=case.scale),
        "weight": randn("weight", C, 1, K, K, std=1 / K),
        "bias": randn("bias", C, mean=case.offset),
    }
    if case.op == "depthwise_conv_norm":
        tensors["norm_weight"] = randn("norm", C, mean=1.0, std=0.5)
        tensors["norm_bias"] = randn("norm", C, std=0.5)
    out_dtype = _dtype_of(case, "out", dtype)
    options = {"compute_dtype": dtype, "out_dtype": out_dtype} if case.wide else {}
    options |= {"shortcut": True} if case.shortcut else {}
    dout, dshortcut = randn("dout", *case.shape).to(out_dtype), randn("x", *case.shape) if case.shortcut else None
    return Inputs(tensors, options, dout, dshortcut=dshortcut)


def _gate_inputs(case: Case, dtype: torch.dtype, randn: Callable) -> Inputs:
    N, C, R = case.shape[0], case.C, case.C if "w2" in case.without else case.reduced
    x = randn("x", *case.shape, std=case.scale)
    tensors = {
        "x": x + randn("x", N, 1, 1, C, std=case.scale),  # means of order 1, which tell the layers' inputs apart
        "w1": randn("w1", R, C, std=C**-0.5),
        "b1": randn("b1", R, std=0.5),
        "w2": randn("w2", C, R, std=R**-0.5),
        "b2": randn("b2", C, std=0.5),
    }
    options = dict(case.options) | ({"act": case.act} if case.act else {}) | ({"compute_dtype": dtype} if case.wide else {})
    dout = randn("dout", *case.shape).to(torch.promote_types(x.dtype, dtype))
    if options.get("data_format") == "NCHW":
        tensors["x"], dout = (t.permute(0, 3, 1, 2).contiguous() for t in (tensors["x"], dout))
    return Inputs(tensors, options, dout)


def _dtype_of(case: Case, name: str, dtype: torch.dtype) -> torch.dtype:
    wide = name in case.wide or (name == "bias" and "weight" in case.wide) or name.replace("b", "w") in case.wide
    return torch.float32 if wide and dtype != torch.float64 else dtype


def run(function: Callable, inputs: Inputs, wanted: tuple[str, ...] | None = None) -> dict[str, torch.Tensor | None]:
    """Result ("out") and gradients ("dx", "dweight", ...) of a call; `wanted` names the tensors that require one."""
    if wanted is None:
        wanted = tuple(name for name, tensor in inputs.tensors.items() if tensor is not None and name not in inputs.constant)
    leaves = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in inputs.tensors.items()}
    out, *shortcut = results if isinstance(results := function(**leaves, **inputs.options), tuple) else (results,)
    assert all(torch.equal(t, leaves["x"]) for t in shortcut), "the shortcut is not x"
    shortcut = [t for t in shortcut if t.requires_grad]
    douts = [inputs.dout, inputs.dshortcut][: 1 + len(shortcut)]
    # zeros for a tensor that the call leaves out, as window_attention does pad_bias where nothing is padded
    grads = torch.autograd.grad([out, *shortcut], [leaves[name] for name in wanted], douts, materialize_grads=True) if wanted else ()
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads)}}


def truth_of(op: str, inputs: Inputs) -> dict[str, torch.Tensor | None]:
    """The reference in float64 on the CPU."""
    tensors = {name: None if t is None else t.detach().cpu().double() for name, t in inputs.tensors.items()}
    options = {k: v for k, v in inputs.options.items() if k not in ("compute_dtype", "out_dtype")}
    dshortcut = None if inputs.dshortcut is None else inputs.dshortcut.cpu().double()
    return run(hub(op).reference, Inputs(tensors, options, inputs.dout.cpu().double(), inputs.constant, dshortcut))


def formula(op: str, first: torch.Tensor, *args, eps: float = 1e-6, act: str | None = None, **options) -> torch.Tensor:
    """An op from its formula: no convolution or norm of PyTorch. The truth where values are not finite.

    A tap adds the pixels of the map that it meets and nothing for padding, where `reference` may multiply an Inf by a zero:
    some of PyTorch's convolutions do, as those for float64 and bfloat16 on the CPU.
    """
    if op == "residual_scale":
        y, gamma, mask = args
        return torch.stack([s + m * (gamma * image) for s, image, m in zip(first, y, mask.flatten())])
    if op == "window_attention":
        return attention_formula(first, *args, **options)
    if op == "squeeze_excite":
        return _gate_formula(first, *args, act=act or "relu", **options)
    if op in ("global_response_norm", "gelu_linear"):
        a = first
        if act == "gelu_tanh":
            a = a * torch.sigmoid((8 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))
        elif act or op == "gelu_linear":
            a = a * 0.5 * torch.erfc(-a / 2**0.5)
        weight, bias = args
        if op == "gelu_linear":
            return torch.stack([(a * w).sum(-1) for w in weight], -1) + bias
        g = torch.linalg.vector_norm(a, dim=(1, 2), keepdim=True)  # its derivative at 0 is 0
        return a + weight * (a * (g / (g.sum(-1, keepdim=True) / g.shape[-1] + eps))) + bias
    weight, bias, *norm = args
    if op == "grouped_conv":
        return _grouped_formula(first, weight, bias, **options)
    (H, W, C), K = first.shape[1:], weight.shape[-1]
    z = bias.expand(first.shape)
    for i, j in itertools.product(range(K), repeat=2):
        a, b = i - K // 2, j - K // 2
        if abs(a) < H and abs(b) < W:
            met = first[:, max(a, 0) : H + min(a, 0), max(b, 0) : W + min(b, 0)] * weight[:, 0, i, j]
            z = z + F.pad(met, (0, 0, max(-b, 0), max(b, 0), max(-a, 0), max(a, 0)))
    if not norm:
        return z
    centred = z - z.sum(-1, keepdim=True) / C
    return centred / (centred.square().sum(-1, keepdim=True) / C + eps).sqrt() * norm[0] + norm[1]


def _gate_formula(x, w1, b1, w2, b2, act="relu", gate="sigmoid", data_format="NHWC") -> torch.Tensor:
    nothing = torch.zeros((), dtype=x.dtype)
    functions = {
        "relu": lambda v: torch.where(v <= 0, nothing, v),
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "gelu": lambda v: v * (1 + torch.erf(v / 2**0.5)) / 2,
        "hardswish": lambda v: v * (v + 3).clamp(0, 6) / 6,
        "leaky_relu": lambda v: torch.where(v > 0, v, 0.01 * v),
        "identity": lambda v: v,
        "sigmoid": torch.sigmoid,
        "hardsigmoid": lambda v: (v + 3).clamp(0, 6) / 6,
    }
    if data_format == "NCHW":
        return _gate_formula(x.permute(0, 2, 3, 1), w1, b1, w2, b2, act, gate).permute(0, 3, 1, 2)
    hidden = functions[act]((x.sum((1, 2)) / (x.shape[1] * x.shape[2]))[:, None, :].mul(w1).sum(-1) + b1)
    return x * functions[gate](hidden[:, None, :].mul(w2).sum(-1) + b2)[:, None, None, :]


def _grouped_formula(x, weight, bias, stride, padding, groups) -> torch.Tensor:
    """Tap by tap over the pixels that it meets; one stride and one padding for both axes."""
    (N, _, H, W), K = x.shape, weight.shape[-1]
    out_H, out_W = ((size + 2 * padding - K) // stride + 1 for size in (H, W))
    z = bias[:, None, None].expand(N, -1, out_H, out_W)
    for i, j in itertools.product(range(K), repeat=2):
        h, w = ([o for o in range(n) if 0 <= o * stride + k - padding < size] for n, k, size in ((out_H, i, H), (out_W, j, W)))
        if h and w:
            met = x[:, :, h[0] * stride + i - padding :: stride, w[0] * stride + j - padding :: stride][:, :, : len(h), : len(w)]
            products = met.unflatten(1, (groups, 1, -1)) * weight[..., i, j].unflatten(0, (groups, -1))[..., None, None]
            z = z + F.pad(products.sum(3).flatten(1, 2), (w[0], out_W - w[-1] - 1, h[0], out_H - h[-1] - 1))
    return z


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty and its kin holds NaN inside the block, so that a value never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class RawCalls(TorchDispatchMode):
    """Records (overload, arguments as they were before, results) of every raw op of this package that runs inside the block."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = func.namespace in NAMESPACES.values()
        before = tuple(a.clone() if ours and schema.is_write else a for a, schema in zip(args, func._schema.arguments))
        results = func(*args, **(kwargs or {}))
        if ours:
            self.calls.append((func, before, results if isinstance(results, tuple) else (results,)))
        return results


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _errors(actual: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Root-mean-square and largest error."""
    difference = actual.detach().cpu().double() - truth
    return _rms(difference), difference.abs().max().item()


def violation(actual, eager, truth, *, grad: bool, dtype: torch.dtype) -> str:
    """How `actual` breaks the tolerance rule, or "".

    error(actual) <= factor * error(eager) + atol[dtype] * rms(truth), error against the float64 truth; the factor is 2
    for outputs and 3 for gradients. It holds for the root-mean-square error (over rms(truth) that is the relative L2
    error), and for the largest error with 4 times the atol.
    """
    if truth.numel() == 0:
        return ""
    if not torch.isfinite(actual).all():
        return f"{(~torch.isfinite(actual)).sum().item()} of {actual.numel()} values are not finite"
    rms = _rms(truth)
    factor = FACTOR_GRADIENT if grad else FACTOR_OUTPUT
    pairs = zip(("rms", "maximum"), _errors(actual, truth), _errors(eager, truth), (1, FACTOR_MAXIMUM))
    for what, error, eager_error, atol_factor in pairs:
        bound = factor * eager_error + ATOL[dtype] * atol_factor * rms
        if not error <= bound:
            return f"{what} error {error:.3g} exceeds {bound:.3g} (eager's own: {eager_error:.3g}, rms of the truth: {rms:.3g})"
    return ""


def assert_matches(actual, eager, truth, *, grad: bool, dtype: torch.dtype, name: str = "out") -> None:
    """Assert the tolerance rule (see `violation`), and that shape and dtype are eager's. `dtype` is that of the products."""
    assert actual.shape == eager.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, eager has {tuple(eager.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager has {eager.dtype}"
    message = violation(actual, eager, truth, grad=grad, dtype=dtype)
    assert not message, f"{name}: {message}"


def faults(case: Case, inputs: Inputs, truth: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Wrong results that the rule must reject, as (fault, tensor, values): all zero, one channel off, taps or scales moved."""
    for name, values in truth.items():
        yield "zero", name, torch.zeros_like(values)
        off = values.clone()
        channel = 0 if name == "dweight" else 1 if case.op == "grouped_conv" and off.dim() == 4 else -1
        off.movedim(channel, 0)[-1:] += _rms(values) if values.numel() else 0
        yield "one channel", name, off
    tensors = dict(inputs.tensors)
    if case.op == "residual_scale":
        moved = [("gamma", (0,), ("out", "dy")), ("mask", (0,), ("out", "dy", "dgamma"))]
    elif case.op == "global_response_norm":
        moved = [("weight", (0,), ("out", "dx")), ("bias", (0,), ("out",))]
        yield "moved", "dweight", truth["dweight"].roll(1, 0)
    elif case.op == "gelu_linear":
        moved = [("weight", (1,), ("out", "dx")), ("bias", (0,), ("out",))]
        yield "moved", "dweight", truth["dweight"].roll(1, 1)
    elif case.op == "window_attention":
        moved = [("bias_table", (0,), ("out", "dqkv"))]
    elif case.op == "squeeze_excite":
        moved = [("w1", (1,), ("out", "dx", "dw2")), ("w2", (0,), ("out", "dx", "dw1"))]
    else:
        affected = ("out", "dx") if case.op in ("depthwise_conv", "grouped_conv") else truth.keys() - {"dweight", "dbias", "dnorm_bias"}
        moved = [("weight", (2, 3), affected)]
        yield "moved", "dweight", truth["dweight"].roll((1, 1), (2, 3))
    if case.shortcut:
        yield "no shortcut", "dx", truth["dx"] - inputs.dshortcut.cpu().double()
    for name, dims, affected in moved:
        if tensors[name] is not None:
            tensors_moved = {**tensors, name: tensors[name].roll([1] * len(dims), dims)}
            wrong = truth_of(case.op, inputs._replace(tensors=tensors_moved))
            for tensor in affected:
                if tensor in truth:
                    yield "moved", tensor, wrong[tensor]


def check_op(case: Case, dtype: torch.dtype, backend: str, device="cpu", seed: int = 0) -> set[tuple[str, str]]:
    """Assert the contract for one call: result and every gradient of `backend` against the float64 truth.

    Asserts too that the bound of this very call rejects each of `faults`, and returns those (fault, tensor).
    """
    inputs = make_inputs(case, dtype, device, seed)
    truth = truth_of(case.op, inputs)
    eager = run(hub(case.op).reference, inputs)
    with use_backend(backend), poisoned():
        assert select(case.op, *inputs.tensors.values()).backend == backend
        actual = run(getattr(ops, case.op), inputs)
    for name in truth:
        assert_matches(actual[name], eager[name], truth[name], grad=name != "out", dtype=dtype, name=f"{case.op} {case} {name}")
    rejected = set()
    for fault, name, wrong in faults(case, inputs, truth):
        if torch.allclose(wrong, truth[name], rtol=0, atol=1e-9):  # nothing to lose or to move, as with K = 1
            continue
        message = violation(wrong, eager[name], truth[name], grad=name != "out", dtype=dtype)
        assert message, f"{case.op} {case} {name}: the bound lets the fault {fault!r} pass"
        rejected.add((fault, name))
    return rejected


def check_not_finite(case: Case, dtype: torch.dtype, backend: str, name: str, value: float, border: bool, device="cpu") -> None:
    """Assert that one Inf or NaN reaches the elements of the result and of every gradient that `formula` says, and no other.

    `name` is the tensor that holds it, or "dout"; with `border` it lies at the corner of the map or filter, where padding is
    near. NaN, Inf and -Inf are told apart, but not behind a norm or GELU, where the order of operations decides where Inf meets -Inf or 0.
    """
    inputs = make_inputs(case, dtype, device)
    tensor = {**inputs.tensors, "dout": inputs.dout}[name]
    grouped = case.op == "grouped_conv"
    if name == "weight" and tensor.dim() == 4:
        h, w = (0, 0) if border else (case.K // 2 - 1, case.K // 2 + 1)
        tensor[case.C // 2, 0, h, w] = value
    elif tensor.dim() == 2 or name == "b1":
        tensor.view(-1)[0 if border else tensor.numel() // 2] = value
    elif grouped and tensor.dim() == 4:
        h, w = (0, -1) if border else (tensor.shape[2] // 2, tensor.shape[3] // 2)
        tensor[-1, case.C // 2, h, w] = value
    elif tensor.dim() == 4:
        h, w = (0, -1) if border else (case.shape[1] // 2, case.shape[2] // 2)
        tensor[-1, h, w, case.C // 2] = value
    else:
        tensor.view(-1)[tensor.numel() // 2] = value
    doubles = {n: t.cpu().double() for n, t in inputs.tensors.items()}
    options = {"act": case.act, **dict(case.options), **inputs.options}
    truth = run(lambda **t: formula(case.op, *t.values(), **options), Inputs(doubles, {}, inputs.dout.cpu().double(), inputs.constant))
    reached = any(not torch.isfinite(t).all() for t in truth.values())
    # Small maps do not meet the corner of the filter, and an infinite bias shuts or opens a gate.
    assert reached or (name == "weight" and border) or name == "b2", "nothing to see"
    with use_backend(backend), poisoned():
        assert select(case.op, *inputs.tensors.values()).backend == backend
        actual = run(getattr(ops, case.op), inputs)
    for what, expected in truth.items():
        got = actual[what].cpu()
        # A zero of the padding may meet an Inf there: filter by filter, or map by map.
        if grouped and expected.dim() == 4 and (what == "dweight" or name in ("weight", "dout")):
            got, expected = (torch.where(torch.isfinite(t), 0.0, torch.nan).sum((2, 3)) for t in (got, expected))
        exact = case.op in ("depthwise_conv", "residual_scale") or (case.op, what) == ("depthwise_conv_norm", "out")
        kinds = (torch.isnan, torch.isposinf, torch.isneginf) if exact else (torch.isfinite,)
        for kind in kinds:
            wrong = (kind(got) != kind(expected)).sum().item()
            assert not wrong, f"{case.op} {case} {value} in {name}: {what} differs in {wrong} of {expected.numel()} places"
