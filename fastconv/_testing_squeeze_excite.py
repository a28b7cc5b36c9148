"""Cases, inputs and formula of squeeze_excite for fastconv.testing."""

from __future__ import annotations

from collections.abc import Callable

import torch


def cases(Case: type) -> list:
    op = "squeeze_excite"

    def case(shape, reduced=6, act="relu", gate="sigmoid", data_format="NHWC", **fields) -> tuple:
        options = {"act": (act, "relu"), "gate": (gate, "sigmoid"), "data_format": (data_format, "NHWC")}
        return Case(op, shape, reduced=reduced, options=tuple((n, v) for n, (v, default) in options.items() if v != default), **fields)

    return [
        case((2, 7, 7, 768), 48, "silu"),
        case((2, 9, 15, 33), 9),
        case((2, 9, 15, 33), 9, "silu", data_format="NCHW"),
        case((1, 17, 29, 17), 1, "silu"),
        case((3, 14, 5, 96), 24, "hardswish", "hardsigmoid"),
        case((5, 3, 7, 130), 70, "gelu", data_format="NCHW"),  # a layer wider than one block of rows
        case((3, 40, 35, 7), 3, "leaky_relu"),  # several slices of pixels
        case((2, 70, 76, 5), 3, "leaky_relu", data_format="NCHW"),  # planes of more than one chunk
        case((2, 2, 1, 1030), 20, "identity"),
        case((6, 2, 3, 24), 4, "hardswish", data_format="NCHW"),  # lanes of small planes
        case((3, 1, 1, 64), 8, "silu"),
        case((3, 1, 1, 64), 8, "gelu", data_format="NCHW"),
        case((4, 3, 2, 1), 1, "silu"),
        case((0, 8, 6, 16)),
        case((2, 0, 5, 8)),
        case((0, 8, 6, 16), data_format="NCHW"),
        case((3, 5, 6, 48), without=("w2", "b2"), gate="hardsigmoid"),
        case((3, 5, 6, 48), without=("b1", "w2", "b2"), data_format="NCHW"),
        case((2, 5, 6, 31), 12, "gelu", without=("b1", "b2")),
        case((2, 5, 6, 31), 12, "silu", without=("b1",), data_format="NCHW"),
        case((2, 5, 6, 32), 8, "silu", wide=("x",)),
        case((2, 5, 6, 32), 8, "silu", wide=("w1", "w2")),  # autocast after a half-precision producer
        case((2, 5, 6, 33), 8, "silu", wide=("x", "w1", "w2"), data_format="NCHW"),  # autocast, float32 maps
        case((2, 5, 6, 24), 8, "silu", scale=0.3),
    ]


def inputs(case: tuple, dtype: torch.dtype, randn: Callable) -> tuple[dict, dict, torch.Tensor]:
    """The tensors by name, the options and the gradient of the result; randn(name, *shape, std=) draws in the dtype of a name."""
    (N, *_, C), R, options = case.shape, case.reduced, dict(case.options)
    if "w2" in case.without:
        R = C
    x = randn("x", *case.shape, std=case.scale)
    x = x + randn("x", N, 1, 1, C, std=case.scale)  # means of order 1, which tell the layers' inputs apart
    tensors = {
        "x": x,
        "w1": randn("w1", R, C, std=C**-0.5),
        "b1": randn("b1", R, std=0.5),
        "w2": randn("w2", C, R, std=R**-0.5),
        "b2": randn("b2", C, std=0.5),
    }
    if case.wide:
        options["compute_dtype"] = dtype
    dout = randn("dout", *case.shape).to(torch.promote_types(tensors["x"].dtype, dtype))
    if options.get("data_format") == "NCHW":
        tensors["x"], dout = (t.permute(0, 3, 1, 2).contiguous() for t in (tensors["x"], dout))
    return tensors, options, dout


def formula(x, w1, b1, w2, b2, act="relu", gate="sigmoid", data_format="NHWC") -> torch.Tensor:
    """The op from its formula: see fastconv.testing.formula."""
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
        return formula(x.permute(0, 2, 3, 1), w1, b1, w2, b2, act, gate).permute(0, 3, 1, 2)
    hidden = functions[act]((x.sum((1, 2)) / (x.shape[1] * x.shape[2]))[:, None, :].mul(w1).sum(-1) + b1)
    return x * functions[gate](hidden[:, None, :].mul(w2).sum(-1) + b2)[:, None, None, :]
