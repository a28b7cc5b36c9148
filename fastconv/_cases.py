"""The cases of each op that `fastconv.testing` checks: chosen, not a cross product."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .ops._registry import FLOAT_DTYPES


class Case(NamedTuple):
    """One call of an op. The dtype is given apart; `wide` names the tensors that are float32 whatever it is."""

    op: str
    shape: tuple[int, ...]  # of the first argument, channels last
    K: int = 7
    without: tuple[str, ...] = ()  # optional arguments left out
    wide: tuple[str, ...] = ()
    mask: str = "image"  # residual_scale: one value an "image", or "one" for all
    scale: float = 1.0  # standard deviation of the first argument; of window_attention a tenth of the logits' size
    offset: float = 0.0  # added to bias: a mean far from zero
    act: str | None = None  # global_response_norm's and squeeze_excite's; of gelu_linear "gelu_tanh" for the approximation
    reduced: int = 6  # squeeze_excite: width between the layers
    options: tuple[tuple[str, str], ...] = ()  # squeeze_excite: further keyword arguments
    width: int = 0  # grouped_conv: channels a group; 0 for C, or a third or a half of it
    out: int = 0  # output channels; 0 for C
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | None = None  # None for K // 2
    heads: int = 1  # window_attention's, as the next three; its shape is that of the result
    window: tuple[int, int] = (3, 2)
    shift: tuple[int, int] = (2, 1)
    order: str = "roll_pad"
    shortcut: bool = False  # depthwise_conv_norm: x comes back, and its gradient goes in
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES

    @property
    def groups(self) -> int:
        width = self.width or next((self.C // n for n in (3, 2) if self.C % n == 0), self.C)
        return max(1, self.C // width)

    @property
    def C(self) -> int:
        return self.shape[-1]

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        if self.op == "grouped_conv":
            parts += [f"k{self.K}", f"g{self.groups}"]
            parts += [f"{name}{value}" for name, value in (("out", self.out), ("stride", self.stride)) if value not in (0, 1)]
            parts += [f"padding{self.padding}"] if self.padding is not None else []
        elif self.op.startswith("depthwise_conv"):
            parts.append(f"k{self.K}")
        elif self.op == "squeeze_excite":
            parts.append(f"r{self.reduced}")
        elif self.op == "window_attention":
            parts += [f"h{self.heads}", "w{}x{}".format(*self.window), "s{}x{}".format(*self.shift), self.order]
        elif self.mask != "image":
            parts.append(f"mask_{self.mask}")
        parts += [f"no_{name}" for name in self.without]
        parts += ["shortcut"] if self.shortcut else []
        if self.wide:
            parts.append("wide_" + "+".join(self.wide))
        if self.scale != 1:
            parts.append(f"scale{self.scale:g}")
        if self.offset:
            parts.append(f"offset{self.offset:g}")
        if self.act:
            parts.append(self.act)
        parts += [value for _, value in self.options]
        return "-".join(parts)


def _conv_cases(op: str) -> list[Case]:
    norm = op == "depthwise_conv_norm"
    params = ("weight", "norm") if norm else ("weight",)
    cases = [
        Case(op, (2, 7, 7, 768)),
        Case(op, (1, 8, 14, 32)),  # whole tiles: rows of 8, strips of 14, blocks of 16 channels
        Case(op, (2, 9, 15, 33)),  # one past each of them
        Case(op, (1, 17, 29, 17)),
        Case(op, (3, 14, 5, 96)),
        Case(op, (5, 3, 7, 130)),
        Case(op, (3, 5, 11, 33), K=5),
        Case(op, (2, 16, 8, 65), K=3),
        Case(op, (1, 6, 5, 3), K=9),
        Case(op, (1, 15, 4, 20), K=13),
        Case(op, (2, 4, 9, 48), K=1),
        Case(op, (3, 1, 1, 64)),
        Case(op, (2, 1, 23, 16)),
        Case(op, (2, 23, 1, 16), K=5),
        Case(op, (4, 2, 3, 24)),  # a map smaller than the kernel
        Case(op, (2, 9, 7, 1), K=3, dtypes=FLOAT_DTYPES[:3] if norm else FLOAT_DTYPES),  # with the norm dx is 0, and float64 all rounding
        Case(op, (70, 2, 3, 17), K=3),  # more bands of rows than partial sums
        Case(op, (0, 8, 6, 16)),
        Case(op, (2, 0, 5, 8), K=3),
        Case(op, (1, 10, 12, 40), without=("bias",)),
        Case(op, (2, 8, 9, 32), wide=("x", *params, "out")),  # autocast, float32 residual stream
        Case(op, (2, 6, 9, 24), wide=params),  # autocast after a half-precision producer
        Case(op, (2, 6, 9, 24), K=5, wide=("x",)),  # half parameters, float32 x
    ]
    if norm:
        cases += [
            Case(op, (2, 6, 9, 24), K=3, wide=("norm",)),
            Case(op, (2, 6, 9, 24), wide=("weight",)),
            Case(op, (2, 7, 9, 19), wide=("x", *params, "out")),  # as before, element by element
            Case(op, (1, 6, 7, 32), K=3, scale=1e-3, without=("bias",)),  # eps is as large as the variance
            Case(op, (1, 6, 7, 32), K=3, offset=1e3, dtypes=(torch.float32, torch.float64)),  # mean far above the deviation
            Case(op, (2, 8, 15, 32), shortcut=True),
            Case(op, (2, 9, 15, 33), K=5, shortcut=True),  # element by element
            Case(op, (2, 6, 5, 19), K=3, shortcut=True),
            Case(op, (2, 6, 5, 3), K=9, shortcut=True),
            Case(op, (0, 8, 6, 16), shortcut=True),
            Case(op, (2, 8, 9, 32), wide=("x", *params, "out"), shortcut=True),
            Case(op, (2, 7, 9, 19), wide=("x", *params, "out"), shortcut=True),
            Case(op, (2, 6, 9, 24), wide=params, shortcut=True),
        ]
    return cases


def _residual_scale_cases() -> list[Case]:
    op = "residual_scale"
    return [
        Case(op, (2, 7, 7, 768)),
        Case(op, (2, 9, 15, 33)),
        Case(op, (1, 17, 29, 17)),
        Case(op, (3, 14, 5, 96)),
        Case(op, (3, 1400, 7)),  # more runs of 64 pixels than partial sums
        Case(op, (2, 67, 1030)),  # more channels than one block holds
        Case(op, (3, 50, 24)),
        Case(op, (6, 40)),
        Case(op, (3, 1, 1, 64)),
        Case(op, (5, 2, 1, 3)),
        Case(op, (4, 3, 2, 1)),
        Case(op, (0, 8, 6, 16)),
        Case(op, (2, 0, 5, 8)),
        Case(op, (2, 5, 6, 31), without=("mask",)),
        Case(op, (4, 5, 6, 31), without=("gamma",)),
        Case(op, (4, 5, 6, 31), without=("gamma", "mask")),
        Case(op, (3, 5, 6, 48), mask="one"),
        Case(op, (2, 5, 6, 32), wide=("shortcut",)),
        Case(op, (2, 5, 6, 32), wide=("shortcut", "gamma")),  # autocast, as ConvNeXt runs it
        Case(op, (2, 5, 6, 33), wide=("y", "mask")),
        Case(op, (2, 5, 6, 17), wide=("gamma",), without=("mask",)),
    ]


def _global_response_norm_cases() -> list[Case]:
    op, gelu = "global_response_norm", {"act": "gelu"}
    return [
        Case(op, (2, 7, 7, 768), **gelu),
        Case(op, (1, 8, 14, 32)),
        Case(op, (2, 9, 15, 33), **gelu),
        Case(op, (1, 17, 29, 17), act="gelu_tanh"),  # more pixels than one partial sum covers
        Case(op, (3, 14, 5, 96), **gelu),
        Case(op, (5, 3, 7, 130)),
        Case(op, (3, 41, 37, 7), **gelu),
        Case(op, (1, 5, 3, 2100), **gelu),  # more channels than one chunk holds
        Case(op, (70, 2, 3, 17), **gelu),
        Case(op, (3, 1, 1, 64), **gelu),
        Case(op, (2, 1, 23, 16)),
        Case(op, (2, 23, 1, 16), act="gelu_tanh"),
        Case(op, (2, 4, 5, 1), **gelu, dtypes=FLOAT_DTYPES[:3]),  # one channel is its own mean
        Case(op, (4, 3, 2, 3), **gelu),
        Case(op, (0, 8, 6, 16), **gelu),
        Case(op, (2, 0, 5, 8)),
        Case(op, (1, 128, 128, 3), **gelu, scale=1e3),  # squares and their sums leave float16's range
        Case(op, (1, 6, 7, 32), scale=1e-4),  # eps is near the mean of the norms
        Case(op, (2, 6, 9, 24), **gelu, wide=("weight", "out")),  # autocast
        Case(op, (2, 6, 9, 24), **gelu, wide=("weight",)),  # autocast, where a linear layer takes the result
        Case(op, (2, 6, 9, 24), wide=("x", "out")),
        Case(op, (2, 6, 9, 24), act="gelu_tanh", wide=("x", "weight", "out")),
    ]


def _gelu_linear_cases() -> list[Case]:
    op = "gelu_linear"
    return [
        Case(op, (2, 7, 7, 768)),
        Case(op, (2, 9, 15, 33)),
        Case(op, (1, 17, 29, 17)),
        Case(op, (3, 14, 5, 96), act="gelu_tanh"),
        Case(op, (3, 200, 24)),
        Case(op, (6, 40)),
        Case(op, (50,)),
        Case(op, (3, 1, 1, 64)),
        Case(op, (5, 2, 1, 3)),
        Case(op, (4, 3, 2, 1)),
        Case(op, (7, 5, 4, 130)),
        Case(op, (1, 2049)),  # one past a chunk
        Case(op, (0, 8, 6, 16)),
        Case(op, (2, 0, 8), act="gelu_tanh"),
        Case(op, (2, 5, 6, 31), without=("bias",)),
        Case(op, (2, 5, 6, 31), without=("bias",), act="gelu_tanh"),
        Case(op, (2, 5, 6, 32), scale=5.0),  # far into both tails
        Case(op, (2, 5, 6, 32), wide=("weight",)),  # autocast after a half-precision producer
        Case(op, (2, 5, 6, 32), wide=("x", "weight")),
        Case(op, (2, 5, 6, 17), wide=("x",), without=("bias",)),
    ]


def _squeeze_excite_cases() -> list[Case]:
    op, hard, nchw = "squeeze_excite", (("gate", "hardsigmoid"),), (("data_format", "NCHW"),)
    return [
        Case(op, (2, 7, 7, 768), reduced=48, act="silu"),
        Case(op, (2, 9, 15, 33), reduced=9),
        Case(op, (2, 9, 15, 33), reduced=9, act="silu", options=nchw),
        Case(op, (1, 17, 29, 17), reduced=1, act="silu"),
        Case(op, (3, 14, 5, 96), reduced=24, act="hardswish", options=hard),
        Case(op, (5, 3, 7, 130), reduced=70, act="gelu", options=nchw),  # a layer wider than one block of rows
        Case(op, (3, 40, 35, 7), reduced=3, act="leaky_relu"),  # several slices of pixels
        Case(op, (2, 70, 76, 5), reduced=3, act="leaky_relu", options=nchw),  # planes of more than one chunk
        Case(op, (2, 2, 1, 1030), reduced=20, act="identity"),
        Case(op, (6, 2, 3, 24), reduced=4, act="hardswish", options=nchw),  # lanes of small planes
        Case(op, (3, 1, 1, 64), reduced=8, act="silu"),
        Case(op, (3, 1, 1, 64), reduced=8, act="gelu", options=nchw),
        Case(op, (4, 3, 2, 1), reduced=1, act="silu"),
        Case(op, (0, 8, 6, 16)),
        Case(op, (2, 0, 5, 8)),
        Case(op, (0, 8, 6, 16), options=nchw),
        Case(op, (3, 5, 6, 48), without=("w2", "b2"), options=hard),
        Case(op, (3, 5, 6, 48), without=("b1", "w2", "b2"), options=nchw),
        Case(op, (2, 5, 6, 31), reduced=12, act="gelu", without=("b1", "b2")),
        Case(op, (2, 5, 6, 31), reduced=12, act="silu", without=("b1",), options=nchw),
        Case(op, (2, 5, 6, 32), reduced=8, act="silu", wide=("x",)),
        Case(op, (2, 5, 6, 32), reduced=8, act="silu", wide=("w1", "w2")),  # autocast after a half-precision producer
        Case(op, (2, 5, 6, 33), reduced=8, act="silu", wide=("x", "w1", "w2"), options=nchw),  # autocast, float32 maps
        Case(op, (2, 5, 6, 24), reduced=8, act="silu", scale=0.3),
        Case(op, (67, 2, 1, 36), reduced=5, act="silu"),  # more images than a tile of the layers' gradients
    ]


def _grouped_conv_cases() -> list[Case]:
    op = "grouped_conv"
    return [
        Case(op, (2, 14, 15, 64), K=3, width=4),
        Case(op, (2, 9, 7, 24), width=8),
        Case(op, (2, 9, 15, 33), K=3, width=11),
        Case(op, (1, 17, 33, 16), K=3, width=2),  # one past vectors of 16, 8 and 4 pixels
        Case(op, (3, 14, 5, 18), K=3, width=6, stride=2),
        Case(op, (2, 8, 9, 16), K=5, width=8, out=32),  # groups that grow
        Case(op, (2, 8, 9, 36), K=5, width=12, out=15, stride=2),  # and shrink
        Case(op, (2, 7, 6, 40), K=3, width=10, padding=0),
        Case(op, (1, 5, 9, 24), K=3, width=12, padding=3),
        Case(op, (2, 6, 5, 32), K=1, width=16),
        Case(op, (2, 7, 5, 40), K=1, width=20, stride=2),
        Case(op, (2, 5, 6, 48), K=3, width=24, stride=2, padding=0),
        Case(op, (2, 7, 7, 64), K=3, width=32),
        Case(op, (2, 6, 4, 80), K=3, width=40, stride=(1, 2), padding=(2, 0)),
        Case(op, (2, 5, 6, 96), K=3, width=48),
        Case(op, (1, 6, 5, 112), K=3, width=56, stride=2),
        Case(op, (2, 4, 5, 128), K=3, width=64),
        Case(op, (1, 5, 4, 160), K=3, width=80),
        Case(op, (1, 5, 4, 192), K=1, width=96),
        Case(op, (1, 3, 5, 224), K=3, width=112, stride=2),
        Case(op, (1, 4, 4, 256), K=3, width=128),
        Case(op, (3, 1, 1, 48), K=3, width=8),
        Case(op, (2, 1, 23, 16), K=5, width=4),
        Case(op, (2, 23, 2, 16), K=3, width=4, stride=2),
        Case(op, (2, 4, 9, 12), K=3, width=1),
        Case(op, (0, 8, 6, 16), K=3, width=4),
        Case(op, (1, 67, 65, 16), K=3, width=8),  # several bands of rows
        Case(op, (40, 3, 4, 8), K=3, width=4),  # more images than partial sums
        Case(op, (1, 10, 12, 40), K=3, width=4, without=("bias",)),
        Case(op, (2, 6, 9, 24), K=3, width=4, wide=("x", "weight")),  # autocast
        Case(op, (2, 6, 9, 24), K=3, width=4, wide=("weight",)),
        Case(op, (2, 6, 9, 24), K=5, width=6, wide=("x",), stride=2),
    ]


def _window_attention_cases() -> list[Case]:
    op, v1, whole = "window_attention", ("logit_scale",), ("pad_bias",)
    seven, eight = {"window": (7, 7), "shift": (3, 3)}, {"window": (8, 8), "shift": (4, 4)}
    pad_first = {"order": "pad_roll"}
    exact = (torch.float32, torch.float64)  # logits near 100, in half precision with errors near 1
    return [
        Case(op, (2, 7, 7, 64), heads=2, window=(7, 7), shift=(0, 0), without=(*v1, *whole)),
        Case(op, (2, 14, 7, 96), heads=3, **seven, without=(*v1, *whole)),  # Swin, shifted
        Case(op, (2, 5, 7, 24), heads=3),  # both sizes do not divide
        Case(op, (2, 5, 7, 24), heads=3, shift=(1, 1), **pad_first),
        Case(op, (2, 9, 8, 33), heads=3, window=(4, 3), shift=(2, 2), **pad_first),
        Case(op, (1, 13, 9, 48), heads=2, **seven, without=v1),
        Case(op, (1, 13, 9, 48), heads=2, **seven, **pad_first, without=v1),
        Case(op, (2, 3, 4, 32), heads=2, **seven, without=v1),  # a map smaller than the window, shifted all the same
        Case(op, (2, 3, 4, 32), heads=2, **seven, **pad_first),
        Case(op, (1, 8, 16, 32), heads=2, **eight, without=whole),
        Case(op, (1, 2, 4, 1024), heads=32, window=(2, 2), shift=(1, 1), without=(*v1, *whole)),
        Case(op, (1, 4, 4, 128), heads=1, window=(4, 2), shift=(1, 0), without=(*v1, *whole)),
        Case(op, (1, 16, 17, 16), heads=1, window=(16, 16), shift=(8, 5)),
        Case(op, (1, 12, 13, 24), heads=1, window=(12, 12), shift=(6, 6), without=v1, **pad_first),
        Case(op, (1, 13, 20, 40), heads=1, window=(12, 10), shift=(6, 5), without=v1),  # several, of neither side's size
        Case(op, (40, 4, 3, 12), heads=2, window=(2, 2), shift=(1, 0)),  # more windows than one task or program takes
        Case(op, (2, 4, 6, 16), heads=2, window=(2, 3), shift=(1, 0), without=("bias_table", *v1, *whole)),
        Case(op, (2, 5, 4, 16), heads=2, window=(2, 3), shift=(1, 2), without=("bias_table", "pad_bias")),
        Case(op, (0, 8, 6, 16)),
        Case(op, (2, 0, 5, 8)),
        Case(op, (3, 1, 1, 8), heads=4, window=(2, 2), shift=(0, 0)),
        Case(op, (1, 8, 8, 32), heads=1, **eight, scale=10.0, without=whole, dtypes=exact),  # a logit overcomes the mask
        Case(op, (2, 7, 5, 32), heads=2, window=(4, 4), shift=(2, 2), scale=10.0, **pad_first, dtypes=exact),
        Case(op, (2, 5, 6, 24), heads=2, wide=("bias_table", "logit_scale", "pad_bias")),  # autocast
        Case(op, (2, 5, 6, 24), heads=2, without=v1, wide=("qkv", "bias_table", "pad_bias")),
    ]


CASES: dict[str, list[Case]] = {
    "depthwise_conv": _conv_cases("depthwise_conv"),
    "depthwise_conv_norm": _conv_cases("depthwise_conv_norm"),
    "gelu_linear": _gelu_linear_cases(),
    "global_response_norm": _global_response_norm_cases(),
    "grouped_conv": _grouped_conv_cases(),
    "residual_scale": _residual_scale_cases(),
    "squeeze_excite": _squeeze_excite_cases(),
    "window_attention": _window_attention_cases(),
}


def dtypes_of(op: str, backend: str) -> tuple[torch.dtype, ...]:
    """Which of a GPU's dtypes the kernels of an op take: window_attention's for CUDA run on tensor cores alone."""
    halves = (torch.bfloat16, torch.float16)
    return halves if (op, backend) == ("window_attention", "cuda") else (torch.float32, *halves)
