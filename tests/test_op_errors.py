"""Wrong arguments: the type of the error, and that its message names op, argument, requirement and value."""

import re

import pytest
import torch

from fastconv import ops, use_backend
from fastconv.ops._registry import OPS
from fastconv.testing import CASES, RawCalls, make_inputs, run

CONV = ("depthwise_conv", "depthwise_conv_norm")
f32, f64, half = torch.float32, torch.float64, torch.bfloat16


def arguments(op, **changed):
    C = 6
    tensors = {"x": (2, 5, 4, C), "weight": (C, 1, 3, 3), "bias": (C,), "norm_weight": (C,), "norm_bias": (C,)}
    if op == "residual_scale":
        tensors = {"shortcut": (2, 5, 4, C), "y": (2, 5, 4, C), "gamma": (C,), "mask": (2, 1, 1, 1)}
    elif op == "squeeze_excite":
        tensors = {"x": (2, 5, 4, C), "w1": (3, C), "b1": (3,), "w2": (C, 3), "b2": (C,)}
    elif op == "window_attention":
        tensors = {"qkv": (2, 5, 4, 3, 2, 3), "bias_table": (15, 2), "logit_scale": (2,), "pad_bias": (3, 2, 3)}
        changed = {"window": (2, 3), **changed}
    elif op == "depthwise_conv":
        tensors = dict(list(tensors.items())[:3])
    elif op == "global_response_norm":
        tensors = {"x": (2, 5, 4, C), "weight": (C,), "bias": (C,)}
    elif op == "grouped_conv":
        tensors = {"x": (2, C, 3, 4), "weight": (4, 3, 3, 3), "bias": (4,)}
        changed = {"groups": 2, "padding": 1} | changed
    elif op == "gelu_linear":
        tensors = {"x": (2, 5, 4, C), "weight": (3, C), "bias": (3,)}
    made = {name: torch.zeros(changed.pop(name) if isinstance(changed.get(name), tuple) else shape) for name, shape in tensors.items()}
    for name, value in changed.items():
        made[name] = made[name].to(value) if isinstance(value, torch.dtype) and name in made else value
    return made


# op, what is wrong, exception, what the message names (besides the op)
WRONG = [
    *((op, *row) for op in CONV for row in (
        ({"x": (5, 4, 6)}, ValueError, ("x must be (N, H, W, C)", "(5, 4, 6)", "x[None]")),
        ({"x": (1, 2, 5, 4, 6)}, ValueError, ("x must be (N, H, W, C)", "(1, 2, 5, 4, 6)")),
        ({"x": (2, 6, 5, 4)}, ValueError, ("weight must be (C, 1, K, K)", "C=4", "(6, 1, 3, 3)", "permute")),
        ({"weight": (6, 2, 3, 3)}, ValueError, ("weight must be (C, 1, K, K)", "(6, 2, 3, 3)")),
        ({"weight": (6, 3, 3)}, ValueError, ("weight must be (C, 1, K, K)", "(6, 3, 3)")),
        ({"weight": (6, 1, 4, 4)}, ValueError, ("weight", "odd", "4 x 4", "conv2d")),
        ({"weight": (6, 1, 3, 5)}, ValueError, ("weight", "square", "3 x 5")),
        ({"weight": (6, 1, 0, 0)}, ValueError, ("weight", "odd", "0 x 0")),
        ({"bias": (5,)}, ValueError, ("bias must be (C,)", "C=6", "(5,)")),
        ({"bias": (6, 1)}, ValueError, ("bias must be (C,)", "(6, 1)")),
        ({"x": torch.int64}, TypeError, ("x must be one of", "float32", "torch.int64", "x.float()")),
        ({"x": torch.bool}, TypeError, ("x must be one of", "torch.bool")),
        ({"x": torch.complex64}, TypeError, ("x must be one of", "torch.complex64")),
        ({"weight": torch.int8}, TypeError, ("weight must be one of", "torch.int8")),
        ({"bias": torch.int32}, TypeError, ("bias must be one of", "torch.int32")),
        ({"x": half}, TypeError, ("weight must have the dtype of x", "bfloat16", "float32", "compute_dtype=")),
        ({"weight": half, "bias": half}, TypeError, ("weight must have the dtype of x", "bfloat16")),
        ({"bias": half}, TypeError, ("bias must have the dtype of weight", "float32", "bfloat16")),
        ({"x": f64, "compute_dtype": f32}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"out_dtype": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"compute_dtype": torch.int32}, TypeError, ("compute_dtype must be one of", "int32")),
        ({"out_dtype": torch.complex64}, TypeError, ("out_dtype must be one of", "complex64")),
        ({"x": [1.0]}, TypeError, ("x must be a torch.Tensor", "list")),
        ({"weight": None}, TypeError, ("weight must be a torch.Tensor", "NoneType")),
        ({"weight": "meta"}, ValueError, ("weight must be on the device", "cpu", "meta", ".to('cpu')")),
        ({"bias": "meta"}, ValueError, ("bias must be on the device", "cpu", "meta")),
    )),
    *(("depthwise_conv_norm", *row) for row in (
        ({"norm_weight": None}, ValueError, ("norm_weight must be (C,)", "None", "ones")),
        ({"norm_bias": None}, ValueError, ("norm_bias must be (C,)", "None")),
        ({"norm_weight": (7,)}, ValueError, ("norm_weight must be (C,)", "C=6", "(7,)")),
        ({"norm_bias": (6, 6)}, ValueError, ("norm_bias must be (C,)", "(6, 6)")),
        ({"norm_weight": torch.int64}, TypeError, ("norm_weight must be one of", "int64")),
        ({"norm_bias": half}, TypeError, ("norm_bias must have the dtype of norm_weight", "float32", "bfloat16")),
        ({"norm_weight": f64, "norm_bias": f64}, TypeError, ("float64 cannot be mixed", "float32", "norm_weight")),
        ({"norm_weight": "meta"}, ValueError, ("norm_weight must be on the device", "meta")),
        ({"norm_bias": "meta"}, ValueError, ("norm_bias must be on the device", "meta")),
    )),
    *(("global_response_norm", *row) for row in (
        ({"x": (5, 4, 6)}, ValueError, ("x must be (N, H, W, C)", "(5, 4, 6)", "permute")),
        ({"x": (2, 6, 5, 4)}, ValueError, ("weight must be (C,)", "C=4", "(6,)")),
        ({"weight": None}, ValueError, ("weight must be (C,)", "C=6", "None", "zeros")),
        ({"bias": (1, 1, 1, 6)}, ValueError, ("bias must be (C,)", "(1, 1, 1, 6)")),
        ({"act": "relu"}, ValueError, ("act must be one of", "gelu_tanh", "'relu'")),
        ({"x": torch.int64}, TypeError, ("x must be one of", "int64")),
        ({"weight": torch.int64}, TypeError, ("weight must be one of", "int64")),
        ({"bias": half}, TypeError, ("bias must have the dtype of weight", "float32", "bfloat16")),
        ({"x": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"out_dtype": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"out_dtype": torch.int32}, TypeError, ("out_dtype must be one of", "int32")),
        ({"weight": "meta"}, ValueError, ("weight must be on the device", "cpu", "meta", ".to('cpu')")),
        ({"bias": "meta"}, ValueError, ("bias must be on the device", "meta")),
    )),
    *(("grouped_conv", *row) for row in (
        ({"x": (6, 3, 4)}, ValueError, ("x must be (N, C, H, W)", "(6, 3, 4)", "x[None]")),
        ({"x": (2, 3, 4, 6)}, ValueError, ("groups must divide", "C=3", "2")),
        ({"x": (2, 8, 3, 4)}, ValueError, ("weight must be (C_out, C / groups, K, K)", "C=8", "groups=2", "(4, 3, 3, 3)", "permute")),
        ({"weight": (3, 3, 3, 3), "bias": (3,)}, ValueError, ("weight must be", "divides C_out", "(3, 3, 3, 3)")),
        ({"weight": (4, 3, 3)}, ValueError, ("weight must be", "(4, 3, 3)")),
        ({"weight": (4, 3, 2, 2)}, ValueError, ("weight must have a square kernel", "2 x 2", "conv2d")),
        ({"weight": (4, 3, 9, 9)}, ValueError, ("1, 3, 5 or 7", "9 x 9", "conv2d")),
        ({"weight": (4, 3, 3, 5)}, ValueError, ("square", "3 x 5")),
        ({"bias": (6,)}, ValueError, ("bias must be (C_out,)", "C_out=4", "(6,)")),
        ({"groups": 0}, ValueError, ("groups must divide", "0")),
        ({"groups": 2.0}, ValueError, ("groups must divide", "2.0")),
        ({"stride": 0}, ValueError, ("stride must be", "at least 1", "0")),
        ({"stride": (1, 2, 3)}, ValueError, ("stride must be", "two", "(1, 2, 3)")),
        ({"padding": -1}, ValueError, ("padding must be", "at least 0", "-1")),
        ({"padding": "same"}, ValueError, ("padding must be", "'same'")),
        ({"padding": 0, "x": (2, 6, 2, 4)}, ValueError, ("x must hold the kernel of 3 x 3", "2 x 4", "pad")),
        ({"x": (2, 6, 0, 4)}, ValueError, ("x must hold the kernel", "0 x 4")),
        ({"x": torch.int64}, TypeError, ("x must be one of", "int64")),
        ({"weight": torch.int8}, TypeError, ("weight must be one of", "int8")),
        ({"bias": torch.int8}, TypeError, ("bias must be one of", "int8")),
        ({"x": half}, TypeError, ("weight must have the dtype of x", "bfloat16", "float32", "compute_dtype=")),
        ({"bias": half}, TypeError, ("bias must have the dtype of weight", "bfloat16")),
        ({"compute_dtype": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"weight": "meta"}, ValueError, ("weight must be on the device", "cpu", "meta", ".to('cpu')")),
        ({"bias": "meta"}, ValueError, ("bias must be on the device", "meta")),
    )),
    *(("gelu_linear", *row) for row in (
        ({"x": (2, 5, 4)}, ValueError, ("x must be (..., C) and weight (D, C)", "(2, 5, 4)", "(3, 6)")),
        ({"weight": (3, 6, 1)}, ValueError, ("x must be (..., C) and weight (D, C)", "(3, 6, 1)")),
        ({"bias": (6,)}, ValueError, ("bias must be (D,)", "D=3", "(6,)")),
        ({"approximate": "erf"}, ValueError, ("approximate must be one of", "'tanh'", "'erf'")),
        ({"x": torch.int64}, TypeError, ("x must be one of", "int64")),
        ({"weight": torch.int8}, TypeError, ("weight must be one of", "int8")),
        ({"bias": torch.int8}, TypeError, ("bias must be one of", "int8")),
        ({"x": half}, TypeError, ("weight must have the dtype of x", "bfloat16", "float32", "compute_dtype=")),
        ({"bias": half}, TypeError, ("bias must have the dtype of weight", "bfloat16")),
        ({"compute_dtype": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"weight": "meta"}, ValueError, ("weight must be on the device", "cpu", "meta", ".to('cpu')")),
        ({"bias": "meta"}, ValueError, ("bias must be on the device", "meta")),
    )),
    *(("residual_scale", *row) for row in (
        ({"shortcut": (6,), "y": (6,)}, ValueError, ("shortcut must be (N, ..., C)", "(6,)")),
        ({"y": (2, 5, 1, 6)}, ValueError, ("y must have the shape of shortcut", "(2, 5, 4, 6)", "(2, 5, 1, 6)")),
        ({"gamma": (5,)}, ValueError, ("gamma must be (C,)", "C=6", "(5,)")),
        ({"gamma": (6, 1, 1)}, ValueError, ("gamma must be (C,)", "(6, 1, 1)")),
        ({"mask": (3, 1, 1, 1)}, ValueError, ("mask must hold one value", "N=2", "(3, 1, 1, 1)")),
        ({"mask": (1, 1, 1, 2)}, ValueError, ("mask must hold one value", "N=2", "(1, 1, 1, 2)")),
        ({"mask": torch.zeros(2, 1, 1, 1, requires_grad=True)}, ValueError, ("mask must not require a gradient", "detach")),
        ({"mask": torch.bool}, TypeError, ("mask must be one of", "bool")),
        ({"shortcut": torch.int32}, TypeError, ("shortcut must be one of", "int32")),
        ({"y": torch.int32}, TypeError, ("y must be one of", "int32")),
        ({"gamma": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"y": "meta"}, ValueError, ("y must be on the device", "cpu", "meta")),
        ({"gamma": "meta"}, ValueError, ("gamma must be on the device", "meta")),
        ({"mask": "meta"}, ValueError, ("mask must be on the device", "meta")),
    )),
    *(("squeeze_excite", *row) for row in (
        ({"x": (5, 4, 6)}, ValueError, ("x must be (N, H, W, C) or (N, C, H, W)", "(5, 4, 6)", "x[None]")),
        ({"x": (2, 6, 5, 4)}, ValueError, ("w1 must be (3, 4)", "C=4", "(3, 6)", "data_format")),
        ({"data_format": "NCHW"}, ValueError, ("w1 must be (3, 5)", "NCHW", "data_format=")),
        ({"data_format": "CHWN"}, ValueError, ("data_format must be one of NHWC, NCHW", "'CHWN'")),
        ({"act": "mish"}, ValueError, ("act must be one of relu, silu", "'mish'")),
        ({"gate": "tanh"}, ValueError, ("gate must be one of sigmoid, hardsigmoid", "'tanh'")),
        ({"w1": (3, 6, 3, 3)}, ValueError, ("w1 must be (3, 6) or (3, 6, 1, 1)", "(3, 6, 3, 3)")),
        ({"w2": (3, 6)}, ValueError, ("w2 must be (6, 3)", "R=3", "(3, 6)")),
        ({"w2": None, "b2": None}, ValueError, ("w1 must be (6, 6)", "(3, 6)")),
        ({"w1": (6, 6), "b1": (6,), "w2": None}, ValueError, ("b2 must be None without w2", "(6,)")),
        ({"b1": (6,)}, ValueError, ("b1 must be (C,)", "3", "(6,)")),
        ({"b2": (6, 1)}, ValueError, ("b2 must be (C,)", "(6, 1)")),
        ({"x": torch.int64}, TypeError, ("x must be one of", "torch.int64")),
        ({"w1": torch.int8}, TypeError, ("w1 must be one of", "int8")),
        ({"w2": torch.bool}, TypeError, ("w2 must be one of", "bool")),
        ({"b1": torch.int32}, TypeError, ("b1 must be one of", "int32")),
        ({"w1": None}, TypeError, ("w1 must be a torch.Tensor", "NoneType")),
        ({"w2": half, "b2": half}, TypeError, ("must have the dtype of x", "bfloat16", "compute_dtype=")),
        ({"b1": half}, TypeError, ("b1 must have the dtype of w1", "bfloat16")),
        ({"x": f64, "compute_dtype": f32}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"compute_dtype": torch.int32}, TypeError, ("compute_dtype must be one of", "int32")),
        ({"w1": "meta"}, ValueError, ("w1 must be on the device", "cpu", "meta")),
        ({"b2": "meta"}, ValueError, ("b2 must be on the device", "meta")),
    )),
    *(("window_attention", *row) for row in (
        ({"qkv": (2, 5, 4, 18)}, ValueError, ("qkv must be (B, H, W, 3, heads, head_dim)", "(2, 5, 4, 18)", "unflatten")),
        ({"qkv": (2, 5, 4, 2, 2, 3)}, ValueError, ("qkv must be (B, H, W, 3, heads, head_dim)", "(2, 5, 4, 2, 2, 3)")),
        ({"qkv": [torch.zeros(2, 5, 4, 2, 3)] * 2}, ValueError, ("(q, k, v)", "2 tensors")),
        ({"qkv": [torch.zeros(2, 5, 4, 6)] * 3}, ValueError, ("(B, H, W, heads, head_dim)", "(2, 5, 4, 6)")),
        ({"qkv": [torch.zeros(2, 5, 4, 2, d) for d in (3, 3, 4)]}, ValueError, ("q, k and v must be", "(2, 5, 4, 2, 4)")),
        ({"qkv": [torch.zeros(2, 5, 4, 2, 3, dtype=d) for d in (f32, half, f32)]}, TypeError, ("dtype of q", "bfloat16")),
        ({"qkv": torch.int64}, TypeError, ("qkv must be one of", "int64")),
        ({"qkv": 3.0}, TypeError, ("qkv must be a torch.Tensor", "float")),
        ({"window": 7}, TypeError, ("window must be a pair", "7")),
        ({"window": (2, 0)}, ValueError, ("window must be (wh, ww)", "(2, 0)")),
        ({"window": (2, 3, 4)}, ValueError, ("window must be (wh, ww)", "(2, 3, 4)")),
        ({"shift": (2, 0)}, ValueError, ("shift must be (sh, sw)", "(2, 0)", "(2, 3)")),
        ({"shift": (0, -1)}, ValueError, ("shift must be (sh, sw)", "(0, -1)")),
        ({"order": "shift_pad"}, ValueError, ("order must be one of 'roll_pad', 'pad_roll'", "'shift_pad'")),
        ({"scale": 0.5}, ValueError, ("scale must be None where logit_scale is given", "0.5")),
        ({"bias_table": (14, 2)}, ValueError, ("bias_table must be (15, 2)", "(14, 2)")),
        ({"bias_table": (2, 6, 6)}, ValueError, ("bias_table must be (15, 2)", "(2, 6, 6)")),
        ({"logit_scale": (3,)}, ValueError, ("logit_scale must be (2,) or (2, 1, 1)", "(3,)")),
        ({"pad_bias": (18,)}, ValueError, ("pad_bias must be (3, 2, 3)", "(18,)")),
        ({"bias_table": torch.int64}, TypeError, ("bias_table must be one of", "int64")),
        ({"logit_scale": torch.bool}, TypeError, ("logit_scale must be one of", "bool")),
        ({"pad_bias": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"compute_dtype": f64}, TypeError, ("float64 cannot be mixed", "float32")),
        ({"compute_dtype": torch.int32}, TypeError, ("compute_dtype must be one of", "int32")),
        ({"bias_table": "meta"}, ValueError, ("bias_table must be on the device", "cpu", "meta")),
        ({"pad_bias": "meta"}, ValueError, ("pad_bias must be on the device", "meta")),
    )),
]  # fmt: skip


@pytest.mark.parametrize("op, changed, error, words", WRONG)
@pytest.mark.parametrize("backend", (None, "eager"))
def test_wrong_arguments(op, changed, error, words, backend):
    given = arguments(op, **{name: value for name, value in changed.items() if not (isinstance(value, str) and value == "meta")})
    given.update({name: given[name].to("meta") for name, value in changed.items() if isinstance(value, str) and value == "meta"})
    with use_backend(backend), pytest.raises(error) as raised:
        getattr(ops, op)(**given)
    message = str(raised.value)
    assert type(raised.value) is error
    assert message.startswith(f"{op}: ")
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} does not name {missing}"
    assert "\n" not in message


@pytest.mark.parametrize("op", sorted(OPS))
def test_right_arguments_are_accepted(op):
    """The table above starts from a call that works."""
    given = arguments(op)
    expected = (2, 4, 3) if op == "grouped_conv" else next(iter(given.values())).shape[:3]
    assert getattr(ops, op)(**given).shape[:3] == expected


def raw_calls(op):
    """Valid direct calls of the raw ops, forward and backward: (overload, arguments)."""
    case = next(c for c in CASES[op] if not c.without and not c.wide and 1 < c.C < 64 and c.K == 7)
    case = case._replace(shortcut=op == "depthwise_conv_norm")
    with use_backend("cpu"), RawCalls() as recorded:
        run(getattr(ops, op), make_inputs(case, f32))
    return [(func, args) for func, args, _ in recorded.calls]


def damaged(tensor):
    """Versions of a tensor that no kernel may touch, by what is wrong."""
    yield "dtype", tensor.to(torch.int32)
    yield "float64", tensor.double()
    yield "rank", tensor[None]
    yield "scalar", tensor.flatten()[0]
    yield "short", tensor[:-1] if tensor.dim() == 1 else tensor[..., :-1].contiguous()
    yield "long", torch.cat([tensor, tensor], -1)
    if tensor.dim() > 1:
        yield "strides", tensor.transpose(0, -1).contiguous().transpose(0, -1)
        yield "expanded", tensor.flatten()[0].expand_as(tensor)
    if tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2]:
        yield "even kernel", tensor[..., :-1, :-1].contiguous()


@pytest.mark.parametrize("op", sorted(OPS))
def test_raw_ops_defend_themselves(op):
    """torch.ops can be called directly: what does not fit raises, it never reads or writes out of bounds."""
    checked = 0
    for func, args in raw_calls(op):
        func(*args)
        schema = [argument.name for argument in func._schema.arguments]
        for index, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                continue
            for wrong, tensor in damaged(arg):
                if wrong in ("strides", "expanded") and tensor.is_contiguous():
                    continue
                if func.__name__.startswith("gelu_linear_fwd") and wrong in ("short", "long"):
                    continue  # flat, and alone: any length is right
                try:
                    func(*args[:index], tensor, *args[index + 1 :])
                except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                    assert re.search(rf"{op}|{schema[index]}", str(error)), error
                    checked += 1
                else:
                    pytest.fail(
                        f"{func} accepted {schema[index]} with wrong {wrong}: {tuple(tensor.shape)} {tensor.dtype} {tensor.stride()}"
                    )
        for index, arg in enumerate(args):
            if isinstance(arg, torch.dtype):
                with pytest.raises(RuntimeError, match=op):
                    func(*args[:index], torch.int32, *args[index + 1 :])
                checked += 1
    assert checked > 15
