"""The Triton kernels on the CPU, run by Triton's interpreter. test_triton_interpreter.py starts this in a process of its own."""
# ruff: noqa: E402

import importlib.util
import os
import pathlib
import re
import sys

import numpy as np
import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_triton_interpreter.py, which sets TRITON_INTERPRET"
sys.path.insert(0, str(pathlib.Path(__file__).parent))  # under pytest's importlib mode it is not there

import fastconv.triton_kernels
import triton_interpreter_fixes
from fastconv.triton_kernels import (
    _common,
    depthwise_conv,
    depthwise_conv_norm,
    gelu_linear,
    global_response_norm,
    grouped_conv,
    residual_scale,
    squeeze_excite,
    window_attention,
)
from op_helpers import GRADIENTS
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from fastconv import ops, use_backend
from fastconv.ops import _registry
from fastconv.ops._registry import OPS, hub
from fastconv.testing import CASES, Case, RawCalls, check_not_finite, check_op, make_inputs, poisoned, run

triton_interpreter_fixes.install()
torch.set_num_threads(1)

KERNELS = pathlib.Path(fastconv.triton_kernels.__file__).parent
MODULES = (_common, depthwise_conv, depthwise_conv_norm, gelu_linear, global_response_norm, grouped_conv, residual_scale)
MODULES += (squeeze_excite, window_attention)
CONV = ("depthwise_conv", "depthwise_conv_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_op = pytest.mark.parametrize("op", sorted(OPS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def is_cheap(case: Case) -> bool:
    """Whether the interpreter, whose time goes by tiles and taps, takes about a second or less."""
    if case.op == "grouped_conv":
        N, H, W, _ = case.shape
        return N * -(-H * W // 64) * case.groups * case.K**2 < 150 and case.C < 100
    if case.op == "window_attention":  # by programs: a window and head each
        B, H, W, _ = case.shape
        programs = B * -(-H // case.window[0]) * -(-W // case.window[1]) * case.heads
        return programs <= 12 and case.window != (16, 16)
    if case.op not in CONV:
        return case.shape != (1, 128, 128, 3)
    N, H, W, C = case.shape
    return N * -(-H // 8) * -(-W // 8) * -(-C // 32) * case.K**2 * (4 if case.K > 7 else 1) < 200


def cases():
    """Every case in every dtype; by default the cheap ones, each in one dtype in turn (depthwise_conv also runs in the norm)."""
    for op in sorted(OPS):
        for i, case in enumerate(CASES[op]):
            for j, dtype in enumerate(DTYPES):
                if dtype in case.dtypes:
                    chosen = is_cheap(case) and (op == "residual_scale" or (i + j) % 3 == 0) and (op != "depthwise_conv" or i % 3 == 0)
                    yield pytest.param(case, dtype, marks=() if chosen else pytest.mark.slow, id=f"{op}-{case}-{dtype}")


@pytest.mark.parametrize(("case", "dtype"), list(cases()))
def test_values_and_gradients(case, dtype):
    check_op(case, dtype, "triton")


def on_triton(op, inputs, wanted=None):
    with use_backend("triton"), poisoned():
        return run(getattr(ops, op), inputs, wanted)


def small(op: str, *shape: int, **options) -> Case:
    return Case(op, shape or (2, 5, 9, 6), K=options.pop("K", 3), **options)


def same_bits(left: dict, right: dict) -> None:
    for name in left.keys() & right.keys():
        assert torch.equal(left[name], right[name]), name


@every_op
@every_dtype
def test_same_bits_again(op, dtype):
    inputs = make_inputs(small(op), dtype)
    same_bits(on_triton(op, inputs), on_triton(op, inputs))


@every_op
@pytest.mark.parametrize("target", (1, 7))
def test_slices_of_many_tiles(op, target, monkeypatch):
    """Partials of a few slices, each of several tiles and the last one short, as large tensors have them."""
    monkeypatch.setattr(_common, "TARGET_PROGRAMS", target)
    check_op(small(op, 3, 9, 5, 20), torch.float32, "triton")


@every_op
def test_many_slices(op):
    """More slices than one step of the reduction takes, and rows past the last whole one."""
    check_op(small(op, 67, 3, 2, 5, K=1), torch.float32, "triton")


@pytest.mark.parametrize("C", (300, 4099))
def test_norm_over_several_blocks(C, monkeypatch):
    if C < 4096:
        whole = depthwise_conv_norm.config
        monkeypatch.setattr(depthwise_conv_norm, "config", lambda C: {**whole(C), "BLOCK_C": 128, "BLOCK_N": 4})
    check_op(small("depthwise_conv_norm", 1, 2, 3, C, K=1), torch.float32, "triton")


@every_op
def test_any_one_gradient(op):
    """Frozen parameters: each gradient alone, and none; what is not needed comes back empty."""
    inputs = make_inputs(small(op), torch.float32)
    full = on_triton(op, inputs)
    for name in full:
        wanted = () if name == "out" else (name[1:],)
        with RawCalls() as recorded:
            some = on_triton(op, inputs, wanted)
        same_bits(some, full)
        assert some.keys() == {"out", *(f"d{w}" for w in wanted)}
        for func, args, results in recorded.calls:
            assert func.namespace == "fastconv_triton"
            fakes = torch.utils._pytree.tree_leaves(_fake(func, args))
            assert [(f.shape, f.stride(), f.dtype) for f in fakes] == [(r.shape, r.stride(), r.dtype) for r in results]


TOO_LARGE = {(17, 16, 16): "windows of 256 tokens at most, got (17, 16)", (2, 2, 136): "a head_dim of 128 at most, got 136"}


@pytest.mark.parametrize("sizes", TOO_LARGE, ids=str)
def test_windows_and_heads_too_large_for_a_program(sizes, monkeypatch):
    """Forced, an error that names the limits; chosen automatically, the reference."""
    *window, head_dim = sizes
    case = small("window_attention", 1, 3, 3, head_dim, window=tuple(window), shift=(1, 1))
    inputs = make_inputs(case, torch.float32)
    with pytest.raises(RuntimeError, match=re.escape(f"'triton' was asked for and cannot run: {TOO_LARGE[sizes]}")):
        on_triton("window_attention", inputs)
    monkeypatch.setitem(_registry.ORDER, "cpu", ("triton",))
    assert ops.select("window_attention", *inputs.tensors.values()).backend == "triton"
    same_bits(run(ops.window_attention, inputs), run(hub("window_attention").reference, inputs))


@pytest.mark.parametrize("side", (7, 8))
def test_bytes_of_window_attention(side, monkeypatch):
    """Of the maps each pass moves every element once, in float16 8 and 14 bytes a token and channel, and of the sums over windows of the
    gradient of the bias a program's first window writes them and the others read and write them: no more."""
    heads, D, N = 2, 32, side * side
    case = Case(
        "window_attention", (1, 3 * side, 2 * side, heads * D), heads=heads, window=(side, side), shift=(3, 3), without=("pad_bias",)
    )
    inputs = make_inputs(case, torch.float16)
    monkeypatch.setattr(_common, "MAX_SLICES", 2)  # three windows to a program, as large batches have
    counts = []
    launch = window_attention.launch

    def counted(*args, **kwargs):
        triton_interpreter_fixes.accesses = found = []
        launch(*args, **kwargs)
        triton_interpreter_fixes.accesses = None
        counts.append(found)

    monkeypatch.setattr(window_attention, "launch", counted)
    on_triton("window_attention", inputs)
    elements = inputs.dout.numel()
    halves, floats = ([sum(a.size * size for a, size in found if size == s) for found in counts[:2]] for s in (2, 4))
    assert [n / elements for n in halves] == [8, 14]
    # Beside them the table, and the sums of 6 windows in 2 slices: written 6 times, read 4 times.
    table = 6 * heads * N * N * 4
    small = 2 * heads * (1 + 3 * D) * 4
    assert floats[0] == table + floats_of_scale(heads)
    assert floats[1] == table + 10 * heads * N * N * 4 + small + floats_of_scale(heads)


SWINS = {7: ((56, 3), (28, 6), (14, 12), (7, 24)), 8: ((64, 3), (32, 6), (16, 12), (8, 24))}  # H = W and heads of T's stages


@pytest.mark.parametrize("side", SWINS)
def test_sums_over_windows_are_few(side):
    """At batch 128 and 32 channels a head, partial sums of the gradient of the bias, written and read, are at most 0.15 of the 14 bytes
    of a token and channel, and there are programs for every multiprocessor."""
    for size, heads in SWINS[side]:
        windows = 128 * (size // side) ** 2
        slices = window_attention.slices_of(windows, heads, True)
        assert 2 * slices * side**4 * 4 <= 0.15 * 14 * windows * side**2 * 32 and slices * heads >= 264, (size, slices)
        assert window_attention.slices_of(windows, heads, False) >= slices


def floats_of_scale(heads: int) -> int:
    """logit_scale: once a program, of which a head has two."""
    return 2 * heads * 4


def _fake(func, args):
    with torch._subclasses.FakeTensorMode() as mode:
        return func(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))


@every_op
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # opcheck backpropagates through raw ops
def test_opcheck(op):
    seen = set()
    for case in (small(op, 1, 2, 3, 4, K=1), small(op, 0, 4, 3, 6)):
        inputs = make_inputs(case, torch.bfloat16)
        with RawCalls() as recorded:
            on_triton(op, inputs)
        for func, args, _ in recorded.calls:
            torch.library.opcheck(func, args)
            seen.add(func.__name__.split(".")[0])
    assert seen == set(hub(op).SCHEMAS)


@every_op
def test_strided_parameters(op):
    inputs = make_inputs(small(op), torch.float32)

    def strided(t):
        return t.new_full([2 * s for s in t.shape], float("nan"))[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)

    changed = {name: t if t.shape == inputs.dout.shape else strided(t) for name, t in inputs.tensors.items()}
    same_bits(on_triton(op, inputs._replace(tensors=changed)), on_triton(op, inputs))


# Masked pixels are zeros in the Triton convolution, and meet the taps: a weight that is Inf gives NaN at the border.
meets_padding = pytest.mark.xfail(raises=AssertionError, strict=True, reason="0 * Inf where an Inf of weight falls on padding")


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, marks=meets_padding if name == "weight" and op in CONV else ())
        for op in sorted(OPS)
        for name in (*GRADIENTS[op], "dout")
    ],
)
@pytest.mark.parametrize(
    ("value", "border", "dtype"), ((float("inf"), True, torch.bfloat16), (float("nan"), False, torch.float32)), ids=("inf", "nan")
)
def test_nan_and_inf_stay_where_the_formula_puts_them(op, name, value, border, dtype):
    """On a map smaller than the tile and, but for grouped_conv, than the taps; window_attention's is padded."""
    case = small(op, 2, 4, 5, 12) if op == "grouped_conv" else small(op, 2, 3 + (op == "window_attention"), 2, 20, K=5)
    check_not_finite(case, dtype, "triton", name, value, border)


@pytest.mark.parametrize("op", sorted(set(OPS) - {"window_attention"}))  # whose programs each take windows from the whole tensor
def test_offsets_past_2_31(op, monkeypatch):
    """Only the last program of each kernel runs, on lazily allocated tensors: it writes the last values, and nothing stray."""
    shape, rows, grouped = (1, 4100, 4100, 128), 8, op == "grouped_conv"
    assert np.prod(shape) > 2**31
    without = ("bias", "mask") if op in (*CONV, "residual_scale") else ()
    corner = make_inputs(small(op, 1, rows, 12, 128, without=without, K=1 if grouped else 3), torch.bfloat16)
    launched = []

    def launch_last(kernel, programs, x, *args, **config):
        if programs < 100:  # the small reductions of partials run whole, on partials that nobody filled
            for result in (a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.float32 and a.numel() < 10**5):
                result.fill_(1)
            return None
        launched.append(kernel.fn.__name__)
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            "create_get_program_id",
            lambda self, axis: interpreter.TensorHandle(np.array([programs - 1], np.int32), interpreter.tl.int32),
        )
        return kernel[(1,)](*args, **config)

    def grown(tensor):
        if tensor is None or tensor.shape != corner.dout.shape:
            return tensor
        big = torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)
        big = big.movedim(-1, 1) if grouped else big
        (big.movedim(1, -1) if grouped else big)[:, -rows:, -12:] = tensor.movedim(1, -1) if grouped else tensor
        return big

    if op == "global_response_norm":  # the sums are 1
        x, weight, bias = (t.float() for t in corner.tensors.values())
        expected = {"out": (x * (weight + 1) + bias).bfloat16(), "dx": (corner.dout.float() * (weight + 1) + x).bfloat16()}
    elif op == "squeeze_excite":  # the sums are 1, and in the backward pass what the gate is applied to
        x, w1, b1, w2, b2 = (t.float() for t in corner.tensors.values())
        z = w2 @ torch.relu(w1.sum(1) + b1) + b2
        expected = {"out": (x * z.sigmoid()).bfloat16(), "dx": (corner.dout.float() / (1 + np.exp(-1))).bfloat16()}
    elif op == "gelu_linear":  # its passes over activations alone
        pass
    else:
        expected = on_triton(op, corner)
    monkeypatch.setattr(_common, "TARGET_PROGRAMS", 10**9)
    monkeypatch.setattr(_common, "MAX_SLICES", 10**5)
    for module in MODULES:
        monkeypatch.setattr(module, "launch", launch_last)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)  # copies whole tensors onto themselves
    if op == "gelu_linear":
        x, ones = (torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16) for _ in range(2))
        x[:, -rows:, -12:], ones[:, -rows:, -12:] = corner.tensors["x"], 1
        value = corner.tensors["x"].double().requires_grad_()
        y = torch.nn.functional.gelu(value)
        expected = {"out": y.detach().bfloat16(), "dx": torch.autograd.grad(y.sum(), value)[0].bfloat16()}
        got = {"out": gelu_linear.fwd(x.view(-1), False, x.dtype).view(shape)}
        got["dx"] = gelu_linear.bwd(ones.view(-1), x.view(-1), False, False).view(shape)
    else:
        big = corner._replace(tensors={n: grown(t) for n, t in corner.tensors.items()}, dout=grown(corner.dout))
        with use_backend("triton"):
            got = run(getattr(ops, op), big)
    first, last = ("scale", "sum") if op == "squeeze_excite" else ("fwd", "bwd")
    assert set(launched) >= {f"{op}_{first}_kernel", "depthwise_conv_wgrad_kernel" if op in CONV else f"{op}_{last}_kernel"}
    for name in ("out", "dx", "dy"):
        if name in got and op in ("gelu_linear", "global_response_norm", "squeeze_excite"):
            torch.testing.assert_close(got[name][0, -1, -1, -32:], expected[name][0, -1, -1, -32:], rtol=0.01, atol=0.01)
        elif name in got and op != "depthwise_conv_norm":
            last = (0, slice(-32, None), -1, -1) if grouped else (0, -1, -1, slice(-32, None))
            assert torch.equal(got[name][last], expected[name][last]), name


# Slices of several tiles each: see rows_per_slice.
FEW = {"depthwise_conv": 10, "depthwise_conv_norm": 3, "gelu_linear": 1, "global_response_norm": 4, "grouped_conv": 12, "residual_scale": 2}
FEW |= {"squeeze_excite": 6, "window_attention": 2}
MUTATED = {op: small(op, 2, 9 if op in CONV else 90, 5, 4) for op in OPS}
MUTATED["depthwise_conv_norm"] = small("depthwise_conv_norm", 2, 9, 5, 4, shortcut=True)
MUTATED["squeeze_excite"] = small("squeeze_excite", 2, 300, 5, 4)
MUTATED["window_attention"] = small("window_attention", 2, 5, 5, 8, shift=(1, 1))
MUTATED["global_response_norm"] = small("global_response_norm", 2, 90, 10, 4, act="gelu")
MUTATED["grouped_conv"] = small("grouped_conv", 2, 9, 9, 4, width=2)
MUTANTS = [
    ("depthwise_conv", "depthwise_conv", "tap = (kh + i) * K + kw", "tap = (kh + i) * K + K - 1 - kw", "out"),
    ("depthwise_conv", "depthwise_conv", "tap = K * K - 1 - tap", "tap = tap", "dx"),
    ("depthwise_conv", "depthwise_conv", "mask=mask & (h >= 0) & (h < H)", "mask=mask & (h >= h0) & (h < H)", "out"),
    ("depthwise_conv", "depthwise_conv", "mask=mask & (h >= 0) & (h < H)", "mask=mask & (h < H)", ""),
    ("depthwise_conv", "depthwise_conv", "((column >= 0) & (column < W))[:, None]", "(column >= w0)[:, None]", ""),
    ("depthwise_conv", "depthwise_conv", "if r - i >= 0 and r - i < BLOCK_H:", "if r - i > 0 and r - i < BLOCK_H:", "dweight"),
    (
        "depthwise_conv",
        "depthwise_conv",
        "(slice_index + 1) * tiles_per_slice, tiles)",
        "(slice_index + 1) * tiles_per_slice - 1, tiles)",
        "d",
    ),
    ("depthwise_conv", "_common", "(s0 + s < S)", "(s0 + s < S - 1)", "d"),
    ("depthwise_conv_norm", "depthwise_conv_norm", "value - mu[:, None], 0.0)", "value, 0.0)", "out"),
    ("depthwise_conv_norm", "depthwise_conv_norm", "normal * along[:, None]", "normal * total[:, None]", "dx"),
    ("depthwise_conv_norm", "depthwise_conv_norm", "dnorm_weight += grad * normal", "dnorm_weight = grad * normal", "dnorm_weight"),
    ("depthwise_conv_norm", "_common", "(s0 + s < S)", "(s0 + s < S - 1)", "d"),
    ("depthwise_conv_norm", "depthwise_conv", "if more is not None:", "if False:", "dx"),
    ("residual_scale", "residual_scale", "first + (row - first * L).to(tl.int32) // L", "first + (row * 0).to(tl.int32)", "out"),
    ("residual_scale", "residual_scale", "dgamma += grad", "dgamma = grad", "dgamma"),
    ("residual_scale", "_common", "(s0 + s < S)", "(s0 + s < S - 1)", "dgamma"),
    ("grouped_conv", "grouped_conv", "(kh - TAP_H) // STEP_H", "kh // STEP_H + 1", "dx"),
    (
        "grouped_conv",
        "grouped_conv",
        "inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)",
        "inside = mask_m & (h >= 0) & (h < H)",
        "",
    ),
    ("grouped_conv", "grouped_conv", "(group * in_width + i).to", "(group * 0 + i).to", "dweight"),
    ("grouped_conv", "grouped_conv", "dbias += tl.sum", "dbias = tl.sum", "dbias"),
    ("gelu_linear", "_activation", "+ x * tl.exp(-0.5 * x * x) * 0.3989422804014327", "", "dx"),
    ("gelu_linear", "gelu_linear", "y + i, activate(value, ACT).to", "y + i, value.to", ""),
    ("global_response_norm", "global_response_norm", "product += a * a", "product = a * a", "out"),
    ("global_response_norm", "global_response_norm", "for s in range(slices):", "for s in range(1, slices):", "out"),
    ("global_response_norm", "global_response_norm", "* product * inverse - through_mean", "* product * inverse", "dx"),
    ("global_response_norm", "global_response_norm", "total += grad", "total = grad", "dbias"),
    ("global_response_norm", "_common", "(s0 + s < S)", "(s0 + s < S - 1)", "d"),
    ("window_attention", "window_attention", "b = n // WW, n % WW", "b = n // WH, n % WH", ""),
    ("window_attention", "window_attention", "0.0, mask_value)", "0.0, 0.0)", "out"),
    ("window_attention", "window_attention", "+ m % WW + WW - 1", "+ m % WW", ""),
    ("window_attention", "window_attention", "pairs & (window > first)", "pairs & (window < first)", "dbias_table"),
    ("window_attention", "window_attention", "- unit * along[:, None]", "", "dqkv"),
    ("window_attention", "window_attention", "dpad_k += ", "dpad_k = ", "dpad_bias"),
    ("window_attention", "_common", "(s0 + s < S)", "(s0 + s < S - 1)", "d"),
    ("squeeze_excite", "squeeze_excite", "acc += value", "acc = value", "out"),
    ("squeeze_excite", "squeeze_excite", "(s0 + s < slices)", "(s0 + s < slices - 1)", "out"),
    ("squeeze_excite", "squeeze_excite", "dy * ((1.0 - s) * s)", "dy * (1.0 - s)", "dx"),
    ("squeeze_excite", "squeeze_excite", "value += tl.load(summand", "value = tl.load(summand", "dx"),
]


@pytest.mark.parametrize(("op", "module", "before", "after", "tensor"), MUTANTS)
def test_a_seeded_bug_is_caught(op, module, before, after, tensor, tmp_path, monkeypatch):
    for path in KERNELS.glob("*.py"):
        source = path.read_text()
        if path.stem == module:
            assert before in source
            source = source.replace(before, after)
        (tmp_path / path.name).write_text(source)
    package = "mutated_triton_kernels"
    spec = importlib.util.spec_from_file_location(package, tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)])
    for name in ("", "._activation", "._common", *(f".{op}" for op in OPS)):
        monkeypatch.delitem(sys.modules, package + name, raising=False)
    monkeypatch.setitem(sys.modules, package, importlib.util.module_from_spec(spec))
    mutant = importlib.import_module(f"{package}.{op}")
    monkeypatch.setattr(sys.modules[f"{package}._common"], "TARGET_PROGRAMS", FEW[op])
    monkeypatch.setitem(sys.modules, f"fastconv.triton_kernels.{op}", mutant)
    with pytest.raises((AssertionError, InterpreterError), match=rf"{op} .* {tensor}|outside of every tensor"):
        check_op(MUTATED[op], torch.float32, "triton")


def test_the_case_of_the_seeded_bugs_passes_without_one(monkeypatch):
    for op in OPS:
        monkeypatch.setattr(_common, "TARGET_PROGRAMS", FEW[op])
        check_op(MUTATED[op], torch.float32, "triton")


def test_bfloat16_is_rounded_as_torch_rounds():
    values = torch.cat(
        [torch.randn(4096) * 10.0 ** torch.randint(-38, 38, (4096,)), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])]
    )
    bits = triton_interpreter_fixes.float_to_bf16(values.numpy())
    expected = values.bfloat16()
    got = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(triton_interpreter_fixes.bf16_to_float(bits))
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
