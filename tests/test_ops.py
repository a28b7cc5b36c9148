"""One contract over every op, backend, case and dtype. The Triton kernels meet the same `check_op` in their own tests."""

import itertools

import numpy as np
import pytest
import torch
from op_helpers import BACKENDS, GRADIENTS, SMALL, bound, every_op, on_cpu_kernels, same_bits

from fastconv import ops, use_backend
from fastconv.ops._registry import OPS
from fastconv.testing import (
    CASES,
    FLOAT_DTYPES,
    Case,
    check_not_finite,
    check_op,
    formula,
    make_inputs,
    poisoned,
    run,
    truth_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def faults_of(case) -> set[tuple[str, str]]:
    """What the bound of a case must reject, unless it is too small to tell right from wrong."""
    tensors = {"out", *(f"d{name}" for name in GRADIENTS[case.op] if name not in case.without)}
    moved = {"residual_scale": {"out", "dy", "dgamma"}, "depthwise_conv_norm": tensors - {"dbias", "dnorm_bias"}}
    moved |= {"squeeze_excite": tensors - {"db1", "db2", *(("dw1",) if "w2" in case.without else ())}}
    moved |= {"window_attention": set() if "bias_table" in case.without else {"out", "dqkv"}}
    moved = moved.get(case.op, {"out", "dx", "dweight"}) & tensors
    lost = {("no shortcut", "dx")} if case.shortcut else set()
    return lost | {*itertools.product(("zero", "one channel"), tensors), *itertools.product(("moved",), moved)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [c for cases in CASES.values() for c in cases], ids=lambda c: f"{c.op}-{c}")
def test_values_and_gradients(case, dtype, backend):
    if dtype not in case.dtypes:
        dtype = torch.float32  # CASES says why
    rejected = check_op(case, dtype, backend)
    if (
        case.K > 1
        and case.C > 1
        and case.shape[0] > 1
        and 0 not in case.shape
        and case.mask == "image"
        and not {"gamma", "mask"} & {*case.without}
    ):
        assert rejected == faults_of(case)
    assert ("zero", "out") in rejected or 0 in case.shape


@every_op
def test_the_reference_is_right(op):
    inputs = make_inputs(SMALL[op]._replace(shape=(2, 5, 8, 6)), torch.float64)
    options = inputs.options
    expected = run(lambda **tensors: formula(op, *tensors.values(), **options), inputs._replace(options={}))
    for name, tensor in truth_of(op, inputs).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-12)


@every_op
@pytest.mark.parametrize("compute", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_under_autocast(op, compute, backend):
    """{float32, half} parameters x {float32, half} activations: each gradient has the dtype of its own input."""
    case = SMALL[op]
    for wide_x, wide_weight, wide_norm, wide_out in itertools.product((False, True), repeat=4):
        flags = {"x": wide_x, "weight": wide_weight, "norm": wide_norm, "out": wide_out}
        if op in ("gelu_linear", "grouped_conv") and (wide_norm or (op == "grouped_conv" and wide_out)):
            continue  # its result has the dtype of the products
        if op == "residual_scale":
            flags = {"shortcut": wide_x, "y": wide_weight, "gamma": wide_norm, "mask": wide_out}
        if op == "squeeze_excite":
            flags = {"x": wide_x, "w1": wide_weight, "w2": wide_norm}
        if op == "window_attention":
            flags = {"qkv": wide_x, "bias_table": wide_weight, "logit_scale": wide_norm, "pad_bias": wide_out}
        inputs = make_inputs(case._replace(wide=tuple(name for name, wide in flags.items() if wide)), compute)
        with use_backend(backend), torch.autocast("cpu", compute):
            got = run(getattr(ops, op), inputs)
        for name, tensor in inputs.tensors.items():
            if name not in inputs.constant:
                assert got[f"d{name}"].dtype == tensor.dtype, name
        assert got["out"].dtype == inputs.dout.dtype
        if op != "residual_scale" and not inputs.options:
            assert got["out"].dtype == compute


@every_op
@pytest.mark.parametrize("K", (1, 3, 5, 7, 9))
def test_gradcheck(op, K):
    case = Case(op, (2, 3, 4, 3), K=min(K, 7) if op == "grouped_conv" else K)
    inputs = make_inputs(case, torch.float64)
    leaves = {n: t.requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    with use_backend("cpu"), poisoned():
        assert torch.autograd.gradcheck(bound(op, inputs), tuple(leaves.values()))


# Maps smaller than the kernel, and with strips of each width inside and at both borders.
MAPS = (((2, 2, 3, 20), 7), ((2, 9, 11, 20), 7), ((1, 8, 33, 17), 7), ((2, 5, 19, 20), 5), ((2, 7, 6, 20), 3), ((2, 4, 17, 20), 9))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in sorted(OPS) for name in (*GRADIENTS[op], "dout")])
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("border", (False, True), ids=("inside", "border"))
@pytest.mark.parametrize(
    ("backend", "dtype"), (("eager", torch.float32), *(("cpu", dtype) for dtype in (torch.float32, torch.bfloat16))), ids=str
)
def test_nan_and_inf_stay_where_the_formula_puts_them(op, name, value, border, backend, dtype):
    for shape, K in MAPS:
        if op == "grouped_conv" and (K > 7 or min(shape[1:3]) < K):
            continue  # no such kernel; and where the padding is wider than the map, a weight's NaN meets nothing else
        check_not_finite(Case(op, shape, K=K), dtype, backend, name, value, border)


@every_op
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(op, dtype, threads):
    state = torch.get_rng_state()
    for case in (c for c in CASES[op] if dtype in c.dtypes):
        inputs = make_inputs(case, dtype)
        results = []
        for count in (1, 2, 3, 1):
            threads(count)
            results.append(on_cpu_kernels(op, inputs))
        for result in results[1:]:
            same_bits(result, results[0], op)
    assert torch.equal(torch.get_rng_state(), state)


def lazy_zeros(*shape) -> torch.Tensor:
    """bfloat16 zeros whose pages take memory only once written."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(set(OPS) - {"squeeze_excite", "window_attention"}))  # in tests of their own
def test_more_than_2_31_elements(op):
    """Offsets past int32, in bfloat16: only the last rows hold values, everything else stays zero."""
    H, W, rows = 16400, 8200, 12
    without = ("bias", "mask") if "conv" in op else ("mask",)
    corner = make_inputs(Case(op, (1, rows, W, 16), K=3, without=without), torch.bfloat16)
    assert H * W * 16 > 2**31

    def nhwc(tensor):
        return tensor.movedim(1, -1) if op == "grouped_conv" and tensor is not None and tensor.dim() == 4 else tensor

    def grown(tensor):
        if tensor is None or tensor.dim() != 4 or nhwc(tensor).shape[1] != rows:
            return tensor
        big = lazy_zeros(1, H, W, nhwc(tensor).shape[-1])
        big[:, -rows:] = nhwc(tensor)
        return big.movedim(-1, 1) if op == "grouped_conv" else big

    def crop(tensor):
        return tensor[:, 1 - rows :] if tensor.dim() == 4 and tensor.shape[1] == H else tensor

    def same_corner(got, expected, name):
        if got.shape == expected.shape:  # sums over every pixel, whose order differs
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2)
        else:
            same_bits({name: crop(nhwc(got))}, {name: nhwc(expected)[:, 1:]}, op)

    big = corner._replace(tensors={n: grown(t) for n, t in corner.tensors.items()}, dout=grown(corner.dout))
    with use_backend("cpu"):
        with torch.no_grad():
            out = getattr(ops, op)(**big.tensors, **corner.options)
            same_corner(out, getattr(ops, op)(**corner.tensors, **corner.options), "out")
            del out
        for name in GRADIENTS[op]:
            if big.tensors[name] is not None:
                expected, got = on_cpu_kernels(op, corner, (name,)), run(getattr(ops, op), big, (name,))
                same_corner(got[f"d{name}"], expected[f"d{name}"], name)
                del got
