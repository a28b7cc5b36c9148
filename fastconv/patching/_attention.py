"""Window attention as the libraries write it: where its parts are, what it computes, and the call of the op instead.

No forward of these can be read as a symbolic graph and compared: they differ too much in how they move windows about. So it is
run: a twin of the module with the same code and state but few channels computes a small map as it is and with the op, in
float64, and the two must agree. That tells the order of padding and rolling, mask, index, norms and packing, whoever wrote them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import nn

from ..ops import Choice, _window, window_attention
from ..ops.window_attention import reference
from ._graph import Unsupported
from ._module import PLAIN, FastModule, Kinds, bypass_reason, child_at, unwrapped
from ._run_body import autocast_dtype, linear, linear_layer, parameter_reason

OP = "window_attention"
HEADS, HEAD_DIM = 2, 3  # of a twin: distinct, so that a transposed packing shows
CHANNELS = HEADS * HEAD_DIM
# Numbers that the code of a module keeps beside its parameters, as a twin has them.
_SIZES = {
    **dict.fromkeys(("num_heads", "num_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "attention_head_size"), HEAD_DIM),
    "all_head_size": CHANNELS,
    **dict.fromkeys(("attention_dropout", "dropout"), 0.0),
}
_MAX_LOGIT_SCALE = log(100)

Window = tuple[tuple[int, int], tuple[int, int], str]  # window, shift, order of padding and rolling


@dataclass(frozen=True)
class Parts:
    """Where a class keeps the parts of its attention. Paths are relative to the module that is patched; "" is that module."""

    geometry: Callable[[nn.Module, int, int], Window]  # of a map of H x W
    attn: str  # the child that is left out
    holder: str  # what holds the table, or logit_scale and the MLP of the positions
    projections: tuple[str, ...]  # one packed linear layer, or those of query, key and value
    proj: str
    dropouts: tuple[str, ...] = ()
    positions: str = "cpb_mlp"  # in the holder
    heads: str = "num_heads"
    scale: str = "scale"
    functional: bool = False  # linear layers are not called, only their parameters read
    mask_value: float = -100.0


@dataclass(frozen=True)
class AttentionLayout:
    parts: Parts
    cosine: bool
    kinds: Kinds  # children whose calls the op replaces, and the linear layers, which get another shape than they used to


def at(module: nn.Module, path: str) -> nn.Module:
    return child_at(module, path) if path else module


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def attend(module: nn.Module, layout: AttentionLayout, x: torch.Tensor, attention=window_attention) -> torch.Tensor:
    """The attention of a map (B, H, W, C), its last linear layer included, with the tokens where they are."""
    parts = layout.parts
    holder, proj = at(module, parts.holder), at(module, parts.proj)
    (wh, ww), shift, order = parts.geometry(module, *x.shape[1:3])
    qkv, pad_bias = _project(module, layout, holder, x, padded=x.shape[1] % wh != 0 or x.shape[2] % ww != 0)
    if layout.cosine:
        scales = {"logit_scale": holder.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()}
        bias = getattr(holder, parts.positions)(holder.relative_coords_table).view(-1, getattr(holder, parts.heads))
        bias = 16 * torch.sigmoid(bias)  # before the index is applied, which changes no value
    else:
        scales = {"scale": getattr(holder, parts.scale, None)}
        bias = _table(module, parts).relative_position_bias_table
    y = attention(qkv, (wh, ww), shift, bias, pad_bias=pad_bias, order=order, mask_value=parts.mask_value, **scales)
    return linear(y, proj.weight, proj.bias) if parts.functional else linear_layer(proj, y)


def _table(module: nn.Module, parts: Parts) -> nn.Module:
    """What has the relative_position_bias_table and its index."""
    holder = at(module, parts.holder)
    return getattr(holder, "relative_position_bias", holder)


def _project(module: nn.Module, layout: AttentionLayout, holder: nn.Module, x: torch.Tensor, padded: bool):
    """qkv as the op takes it, and if needed the qkv of a padded token, a zero before the linear layer: its bias."""
    parts = layout.parts
    heads = getattr(holder, parts.heads)
    layers = [at(module, path) for path in parts.projections]
    if len(layers) > 1:
        qkv = tuple(linear_layer(layer, x).unflatten(-1, (heads, -1)) for layer in layers)
        biases = [layer.bias for layer in layers] if padded else []
        given = next((b for b in biases if b is not None), None)
        bias = None if given is None else torch.cat([torch.zeros_like(given) if b is None else b for b in biases])
    elif parts.functional or getattr(holder, "q_bias", None) is not None:
        bias = _packed_bias(layers[0], holder, layout.cosine)
        qkv = linear(x, layers[0].weight, bias).unflatten(-1, (3, heads, -1))
    else:
        qkv = linear_layer(layers[0], x).unflatten(-1, (3, heads, -1))
        bias = layers[0].bias if padded else None
    return qkv, bias.view(3, heads, -1) if padded and bias is not None else None


def _packed_bias(layer: nn.Linear, holder: nn.Module, cosine: bool) -> torch.Tensor | None:
    """The bias of a packed layer whose class does not call it. In cosine attention keys have none, whatever parameter there is."""
    if getattr(holder, "q_bias", None) is not None:
        key = getattr(holder, "k_bias", None)
        return torch.cat((holder.q_bias, torch.zeros_like(holder.v_bias) if key is None else key, holder.v_bias))
    bias = layer.bias
    if bias is None or not cosine:
        return bias
    q, k, v = bias.chunk(3)
    return torch.cat((q, torch.zeros_like(k), v))


def call_reason(module: FastModule, layout: AttentionLayout, x: torch.Tensor, H: int, W: int) -> str:
    """Why the op cannot stand for the attention of this input, a map of H x W, or "". Fixed texts of what compile can guard."""
    parts = layout.parts
    holder = at(module, parts.holder)
    reason = bypass_reason(module, layout.kinds) or _drop_reason(module, holder, parts)
    if reason:
        return reason
    (wh, ww), _, _ = parts.geometry(module, H, W)
    if _positions(module, layout) != (2 * wh - 1) * (2 * ww - 1):
        return "the window is not the one that the relative positions are for"
    dtypes = set()
    for name, child in [("attention", holder), ("attention", _table(module, parts)), *((p, at(module, p)) for p in _linears(parts))]:
        for parameter in child._parameters.values():
            reason = parameter_reason(name, parameter, x)
            if reason:
                return reason
            if parameter is not None:
                dtypes.add(parameter.dtype)
    if x.shape[-1] != getattr(at(module, parts.projections[0]), "in_features", x.shape[-1]):
        return "the input does not have the block's channels"
    if not parts.functional and (H % wh or W % ww) and any("bias" not in at(module, p)._parameters for p in parts.projections):
        return "the bias of a projection is parametrized, and padding needs it once more"
    if autocast_dtype(x) is None:
        return "" if dtypes <= {x.dtype} else "the input and the parameters of the attention have different dtypes"
    return "autocast does not cast float64" if torch.float64 in (*dtypes, x.dtype) else ""


def choose(module: FastModule, layout: AttentionLayout, x: torch.Tensor, H: int, W: int) -> Choice:
    """What runs the op on this input, a map of H x W."""
    parts = layout.parts
    window, _, _ = parts.geometry(module, H, W)
    return _window.choose(x, (), window, _head_dim(module, layout, at(module, parts.holder)), autocast_dtype(x) or x.dtype)


def _head_dim(module: nn.Module, layout: AttentionLayout, holder: nn.Module) -> int:
    """By the layer after the heads."""
    return getattr(at(module, layout.parts.proj), "in_features", 0) // getattr(holder, layout.parts.heads)


def _linears(parts: Parts) -> tuple[str, ...]:
    return (*parts.projections, parts.proj)


def _drop_reason(module: nn.Module, holder: nn.Module, parts: Parts) -> str:
    for path in parts.dropouts:
        child = at(module, path)
        if child.training and child.p:
            return "dropout of the attention drops values, in the order of the windows"
    dropped = (getattr(holder, name, 0.0) for name in ("attention_dropout", "dropout"))
    if holder.training and any(isinstance(p, (int, float)) and p for p in dropped):
        return "dropout of the attention drops values, in the order of the windows"
    return ""


def _positions(module: nn.Module, layout: AttentionLayout) -> int:
    if layout.cosine:
        return at(module, layout.parts.holder).relative_coords_table.numel() // 2
    return _table(module, layout.parts).relative_position_bias_table.shape[0]


def standard_index(wh: int, ww: int) -> torch.Tensor:
    """(N, N) int64: the row of the table for each pair of tokens of a window."""
    rows, cols = (t.flatten() for t in torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij"))
    return (rows[:, None] - rows + wh - 1) * (2 * ww - 1) + cols[:, None] - cols + ww - 1


def read_attention(module: nn.Module, parts: Parts, mixin: type) -> AttentionLayout:
    """The layout of a module whose class may be one of `parts`. Raises Unsupported where it computes anything else."""
    for path in () if parts.functional else _linears(parts):
        kind = unwrapped(type(at(module, path)))
        if kind is not nn.Linear or nn.Linear.forward.__qualname__ != "Linear.forward":
            raise Unsupported(f"{path} is a {kind.__name__}, not a plain Linear")
    for path in parts.dropouts:
        kind = type(at(module, path))
        if kind is not nn.Dropout:
            raise Unsupported(f"{path} is a {kind.__name__}, not a Dropout")
    holder = at(module, parts.holder)
    cosine = "logit_scale" in holder._parameters or "logit_scale" in getattr(holder, "parametrizations", ())
    if getattr(holder, "qkv_bias_separate", False):
        raise Unsupported("it adds the bias of qkv on its own")
    positions = f"{parts.holder}.{parts.positions}".lstrip(".")
    kinds = [
        (path, unwrapped(type(child)))
        for path, child in (() if parts.functional else module.named_modules())
        if path and f"{path}.".startswith(f"{parts.attn}." if parts.attn else "")
        if not f"{path}.".startswith(f"{positions}.") and ".parametrizations." not in f".{path}."
    ]
    kinds += [(path, nn.Dropout) for path in parts.dropouts if path not in dict(kinds)]
    layout = AttentionLayout(parts, cosine, tuple(kinds))
    index = (holder if cosine else _table(module, parts)).relative_position_index
    window = pair(parts.geometry(module, 1 << 16, 1 << 16)[0])
    if index.device.type != "meta" and not torch.equal(index.cpu().view(-1), standard_index(*window).view(-1)):
        raise Unsupported("its relative_position_index is not the standard one of its window")
    reason = _rehearsal_reason(module, layout, mixin)
    if reason:
        raise Unsupported(reason)
    return layout


def _rehearsal_reason(module: nn.Module, layout: AttentionLayout, mixin: type) -> str:
    """Why a twin of the module, run with the op, does not do what it does as it is, or ""."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            twin = _twin(module, layout.parts)
            for (batch, height, width), settings in mixin.rehearsals(module, layout):
                twin.__dict__.update(settings)
                torch.manual_seed(1)
                inputs = mixin.inputs(torch.randn(batch, height, width, CHANNELS, dtype=torch.float64))
                kept, state, calls = inputs[0].clone(), torch.get_rng_state(), []
                expected, after = twin.forward(*inputs), torch.get_rng_state()

                def run(*args, calls=calls, **kwargs):
                    calls.append(1)
                    return mixin.run(twin, layout, *args, attention=reference, **kwargs)

                torch.set_rng_state(state)
                twin.__dict__[mixin.entry] = run
                actual = twin.forward(*inputs)
                del twin.__dict__[mixin.entry]
                same = len(calls) == 1 and torch.equal(inputs[0], kept) and torch.equal(after, torch.get_rng_state())
                if not same or not _equal(actual, expected):
                    return "its forward computes something else than the attention of shifted windows that fastconv knows"
    except Unsupported as error:
        return str(error)
    except Exception as error:  # user code meets a module that was made for this
        return f"its forward cannot be tried on a small map ({type(error).__name__})"
    return ""


def _equal(a, b) -> bool:
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9))


def _twin(module: nn.Module, parts: Parts) -> nn.Module:
    """The module with the same code and few channels: random parameters, no hooks, no dropout, on the CPU in float64."""
    packed = 3 * CHANNELS // len(parts.projections)
    small = {path: _linear(at(module, path), CHANNELS, packed) for path in parts.projections}
    small[parts.proj] = _linear(at(module, parts.proj), CHANNELS, CHANNELS)
    small |= {path: nn.Dropout(0.0) for path in parts.dropouts}
    small[f"{parts.holder}.{parts.positions}".lstrip(".")] = nn.Linear(2, HEADS).double()
    return _copied(module, "", parts, small)


def _linear(layer: nn.Module, inputs: int, outputs: int) -> nn.Linear:
    bias = layer._parameters.get("bias", "parametrized") is not None
    return nn.Linear(inputs, outputs, bias=bias).double()


def _copied(module: nn.Module, path: str, parts: Parts, small: dict[str, nn.Module]) -> nn.Module:
    if path in small:
        return small[path]
    if path and parts.attn and not f"{path}.".startswith(f"{parts.attn}."):  # a norm, drop path or MLP around the attention
        if not any(True for _ in module.parameters()):
            return copy.deepcopy(module)
        if "norm" in path:
            norm = nn.LayerNorm(CHANNELS).double()
            nn.init.normal_(norm.weight)
            return norm
        return nn.Linear(CHANNELS, CHANNELS).double()
    twin = nn.Module.__new__(type(module))
    nn.Module.__init__(twin)
    twin.__dict__.update({k: _SIZES.get(k, v) for k, v in module.__dict__.items() if k not in twin.__dict__})
    twin.training = module.training
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(_few(name, parameter).double())
    for name, buffer in module._buffers.items():
        twin._buffers[name] = buffer if buffer is None else _value(twin, name, buffer)
    for name, child in module._modules.items():
        twin._modules[name] = child and _copied(child, f"{path}.{name}".lstrip("."), parts, small)
    return twin


def _few(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Random values in the shape that a parameter has with few channels."""
    if name == "relative_position_bias_table":
        return torch.randn(tensor.shape[0], HEADS)
    if name == "logit_scale":  # on both sides of the limit, where cosines lie as far apart as a mask of -100 moves them
        return torch.linspace(4.2, 5, HEADS).view(HEADS, *tensor.shape[1:])
    return torch.randn(CHANNELS)


def _value(twin: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor:
    if name == "k_bias":
        return torch.randn(CHANNELS, dtype=torch.float64)
    if name == "relative_coords_table":
        return torch.randn(buffer.shape, dtype=torch.float64)
    if buffer.device.type == "meta" and name == "relative_position_index":
        return standard_index(*pair(twin.window_size)).view(buffer.shape)
    if buffer.device.type == "meta" and name == "attn_mask" and hasattr(twin, "get_attn_mask"):
        return twin.get_attn_mask(device=torch.device("cpu"), dtype=torch.float64)
    buffer = buffer.cpu()
    return buffer.double() if buffer.is_floating_point() else buffer


def plain(x) -> str:
    """Why this is not a tensor of torch's own, or ""."""
    return "" if type(x) in PLAIN else f"the input is a {type(x).__name__}"
