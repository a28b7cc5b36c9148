"""One contract over every op, backend, case and dtype. The Triton kernels meet the same `check_op` in their own tests."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastconv import disabled, ops, use_backend
from fastconv.ops._registry import OPS, hub
from fastconv.testing import CASES, FLOAT_DTYPES, Case, RawCalls, assert_matches, check_op, make_inputs, poisoned, run, truth_of

BACKENDS = ("eager", "cpu")  # never shortened where the library is not built: such a build must be red
SMALL = {op: next(c for c in cases if not c.without and not c.wide and 1 < c.C < 64) for op, cases in CASES.items()}
GRADIENTS = {
    "depthwise_conv": ("x", "weight", "bias"),
    "depthwise_conv_norm": ("x", "weight", "bias", "norm_weight", "norm_bias"),
    "residual_scale": ("shortcut", "y", "gamma"),
}
every_op = pytest.mark.parametrize("op", sorted(OPS))
half_and_float = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


def same_bits(left: dict, right: dict) -> None:
    for name in left.keys() & right.keys():
        assert torch.equal(left[name], right[name]), name


def on_cpu_kernels(op, inputs, wanted=None):
    with use_backend("cpu"), poisoned():
        return run(getattr(ops, op), inputs, wanted)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # small maps; the number of threads has its own test


def faults_of(case) -> set[tuple[str, str]]:
    """What the bound of a case must reject, unless it is too small to tell right from wrong."""
    tensors = {"out", *(f"d{name}" for name in GRADIENTS[case.op] if name not in case.without)}
    moved = {"depthwise_conv": {"out", "dx", "dweight"}, "depthwise_conv_norm": tensors - {"dbias", "dnorm_bias"}}
    moved = moved.get(case.op, {"out", "dy", "dgamma"}) & tensors
    return {*itertools.product(("zero", "one channel"), tensors), *itertools.product(("moved",), moved)}


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


def independent(op, shortcut_or_x, *args, eps=1e-6):
    """The ops once more, from their formulas: loops over taps, no convolution or norm of PyTorch."""
    if op == "residual_scale":
        y, gamma, mask = args
        images = [s + m * (gamma * image) for s, image, m in zip(shortcut_or_x, y, mask.flatten())]
        return torch.stack(images)
    x, (weight, bias, *norm) = shortcut_or_x, args
    N, H, W, C = x.shape
    K = weight.shape[-1]
    padded = x.new_zeros(N, H + K - 1, W + K - 1, C)
    padded[:, K // 2 : K // 2 + H, K // 2 : K // 2 + W] = x
    z = bias.expand(N, H, W, C)
    for i, j in itertools.product(range(K), repeat=2):
        z = z + padded[:, i : i + H, j : j + W] * weight[:, 0, i, j]
    if not norm:
        return z
    centred = z - z.sum(-1, keepdim=True) / C
    return centred / (centred.square().sum(-1, keepdim=True) / C + eps).sqrt() * norm[0] + norm[1]


@every_op
def test_the_reference_is_right(op):
    inputs = make_inputs(SMALL[op]._replace(shape=(2, 5, 8, 6)), torch.float64)
    expected = run(lambda **tensors: independent(op, *tensors.values()), inputs)
    for name, tensor in truth_of(op, inputs).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-12)


@every_op
@half_and_float
def test_any_subset_of_gradients(op, dtype):
    inputs = make_inputs(SMALL[op], dtype)
    full = on_cpu_kernels(op, inputs)
    for count in range(len(GRADIENTS[op])):
        for wanted in itertools.combinations(GRADIENTS[op], count):
            some = on_cpu_kernels(op, inputs, wanted)
            assert some.keys() == {"out", *("d" + name for name in wanted)}
            same_bits(some, full)


@every_op
def test_unneeded_gradients_are_not_computed(op):
    """Each group of gradients that the raw backward can leave out comes back empty."""
    inputs = make_inputs(SMALL[op], torch.float32)
    for wanted in GRADIENTS[op]:
        with RawCalls() as recorded:
            on_cpu_kernels(op, inputs, (wanted,))
        for func, _, results in recorded.calls:
            if func.__name__.startswith(f"{op}_bwd"):
                names = [result.name for result in func._schema.returns]
                numbers = dict(zip(names, (result.numel() for result in results)))
                assert numbers[f"d{wanted}"] == inputs.tensors[wanted].numel()
                group = {"weight": "bias", "bias": "weight", "norm_weight": "norm_bias", "norm_bias": "norm_weight"}.get(wanted)
                assert all(n == 0 for name, n in numbers.items() if name not in (f"d{wanted}", f"d{group}")), numbers


def strided(tensor):
    """The same values as every second element of a larger buffer, in each dimension."""
    wide = tensor.new_full([2 * s for s in tensor.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def offset(tensor):
    """The same values at an address that is no multiple of a vector's size."""
    return torch.cat([tensor.new_full((3,), float("nan")), tensor.flatten()])[3:].view(tensor.shape)


LAYOUTS = {
    "nchw": lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1),
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": strided,
    "offset": offset,
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_map": lambda t: t[:, :1, :1].expand_as(t),
    "expanded_all": lambda t: t.flatten()[0].expand_as(t),
}


@every_op
@half_and_float
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_activations(op, dtype, layout):
    inputs = make_inputs(SMALL[op], dtype)
    change = LAYOUTS[layout]
    tensors = {name: change(t) if t.shape == inputs.dout.shape else t for name, t in inputs.tensors.items()}
    given = inputs._replace(tensors=tensors, dout=change(inputs.dout))
    dense = {name: t.contiguous() for name, t in tensors.items()}
    same_bits(on_cpu_kernels(op, given), on_cpu_kernels(op, inputs._replace(tensors=dense, dout=given.dout.contiguous())))


@every_op
@half_and_float
@pytest.mark.parametrize("change", (strided, offset, lambda t: t.flatten()[0].expand_as(t)), ids=("strided", "offset", "expanded"))
def test_layouts_of_parameters(op, dtype, change):
    inputs = make_inputs(SMALL[op], dtype)
    tensors = {name: t if t.shape == inputs.dout.shape else change(t) for name, t in inputs.tensors.items()}
    dense = inputs._replace(tensors={name: t.contiguous() for name, t in tensors.items()})
    same_bits(on_cpu_kernels(op, inputs._replace(tensors=tensors)), on_cpu_kernels(op, dense))


@every_op
def test_sum_and_unused_results(op):
    """Backward of .sum() arrives with strides 0, of a slice as a padded map; and a leaf may be used twice."""
    inputs = make_inputs(SMALL[op], torch.float32)
    leaves = {n: t.detach().requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    with use_backend("cpu"):
        out = getattr(ops, op)(**leaves)
        out.sum().backward()
        expected = on_cpu_kernels(op, inputs._replace(dout=torch.ones_like(out)))
        same_bits({f"d{n}": t.grad for n, t in leaves.items() if t.requires_grad}, expected)


@every_op
@pytest.mark.parametrize("compute", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_under_autocast(op, compute, backend):
    """{float32, half} parameters x {float32, half} activations: each gradient has the dtype of its own input."""
    case = SMALL[op]
    for wide_x, wide_weight, wide_norm, wide_out in itertools.product((False, True), repeat=4):
        flags = {"x": wide_x, "weight": wide_weight, "norm": wide_norm, "out": wide_out}
        if op == "residual_scale":
            flags = {"shortcut": wide_x, "y": wide_weight, "gamma": wide_norm, "mask": wide_out}
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
    case = Case(op, (2, 3, 4, 3), K=K)
    inputs = make_inputs(case, torch.float64)
    leaves = {n: t.requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    with use_backend("cpu"), poisoned():
        assert torch.autograd.gradcheck(lambda *args: getattr(ops, op)(*args), tuple(leaves.values()))


@every_op
@half_and_float
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # opcheck differentiates the raw op itself
def test_opcheck(op, dtype):
    cases = [SMALL[op], *(c for c in CASES[op] if c.without or 0 in c.shape), *(c for c in CASES[op] if c.wide)]
    seen = set()
    for case in cases:
        inputs = make_inputs(case, dtype)
        with RawCalls() as recorded:
            on_cpu_kernels(op, inputs)
            with torch.no_grad():
                on_cpu_kernels(op, inputs, ())
        for func, args, _ in recorded.calls:
            torch.library.opcheck(func, args)
            seen.add(func.__name__.split(".")[0])
    assert seen == set(hub(op).SCHEMAS)


@every_op
@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(op, dynamic):
    """One graph forward and backward, the same bits as without compile (to_eager backends run the same kernels)."""
    torch._dynamo.reset()
    inputs = make_inputs(SMALL[op], torch.float32)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend("cpu"):
        got = run(compiled, inputs)
        with torch.no_grad():
            same_bits(run(compiled, inputs, ()), got)
    eager = run(hub(op).reference, inputs)
    truth = truth_of(op, inputs)
    for name in truth:
        assert_matches(got[name], eager[name], truth[name], grad=name != "out", dtype=torch.float32, name=name)
    if op != "residual_scale":  # plain PyTorch under compile, by design
        same_bits(got, on_cpu_kernels(op, inputs))


def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = make_inputs(SMALL["depthwise_conv_norm"], torch.float32)

    def block(x, weight, bias, norm_weight, norm_bias):
        y = ops.depthwise_conv_norm(x, weight, bias, norm_weight, norm_bias)
        return ops.residual_scale(x, torch.nn.functional.gelu(y), norm_weight)

    with use_backend("cpu"):
        got = run(torch.compile(block, fullgraph=True), inputs)
    with use_backend("eager"):
        eager = run(block, inputs)
        doubles = {name: t.double() for name, t in inputs.tensors.items()}
        truth = run(block, inputs._replace(tensors=doubles, dout=inputs.dout.double()))
    for name in truth:
        assert_matches(got[name], eager[name], truth[name], grad=name != "out", dtype=torch.float32, name=name)


@every_op
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("activations", "gradient", "parameters"))
@pytest.mark.parametrize("border", (False, True), ids=("inside", "border"))
@half_and_float
def test_nan_and_inf_stay_where_they_were(op, value, where, dtype, border):
    inputs = make_inputs(SMALL[op]._replace(shape=(3, 11, 12, 20)), dtype)
    spots = {
        "activations": [t for name, t in inputs.tensors.items() if t.shape == inputs.dout.shape],
        "gradient": [inputs.dout],
        "parameters": [],
    }[where]
    for index, tensor in enumerate(spots):
        tensor[2, 0 if border else 4, 11 if border else 5, 17 - index] = value
    if where == "parameters":
        next(inputs.tensors[name] for name in ("bias", "gamma") if name in inputs.tensors)[7] = value
    got, truth = on_cpu_kernels(op, inputs), truth_of(op, inputs)
    assert not torch.isfinite(torch.cat([t.flatten() for t in truth.values()])).all()
    for name, expected in truth.items():
        result = got[name]
        if name == "dweight" and border:  # taps that met the padding: 0 * Inf is what an implementation makes of it
            result, expected = result.sum((1, 2, 3)), expected.sum((1, 2, 3))
        assert torch.equal(torch.isfinite(result), torch.isfinite(expected)), name
        if name == "out" or op != "depthwise_conv_norm":  # Inf - Inf in the norm's gradient depends on the order of the sum
            assert torch.equal(result.isnan(), expected.isnan()), name


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
            same_bits(result, results[0])
    assert torch.equal(torch.get_rng_state(), state)


@every_op
@half_and_float
def test_inference_saves_nothing_and_gives_the_bits_of_training(op, dtype):
    inputs = make_inputs(SMALL[op], dtype)
    trained = on_cpu_kernels(op, inputs)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), RawCalls() as recorded:
            result = on_cpu_kernels(op, inputs, ())
        same_bits(result, trained)
        (call,) = recorded.calls
        assert [r.numel() > 0 for r in call[2]] == [True] + [False] * (len(call[2]) - 1)
    parameters = {name: t.requires_grad_(name not in inputs.constant) for name, t in inputs.tensors.items()}
    with torch.no_grad(), use_backend("cpu"):
        assert getattr(ops, op)(**parameters).grad_fn is None


@every_op
def test_second_derivatives(op):
    inputs = make_inputs(SMALL[op]._replace(shape=(2, 3, 4, 3), K=3), torch.float64)
    leaves = {n: t.requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    function = getattr(ops, op)
    wanted = [t for t in leaves.values() if t.requires_grad]
    with use_backend("cpu"):
        plain = torch.autograd.grad(function(**leaves).square().sum(), wanted)
        grads = torch.autograd.grad(function(**leaves).square().sum(), wanted, create_graph=True)
        assert all(torch.equal(g, p) for g, p in zip(grads, plain))
        for tensor in wanted:  # one at a time: a path that is not connected would be dropped in silence
            with pytest.raises(RuntimeError, match=rf"{op}: second derivatives .*with fastconv\.disabled\(\)"):
                torch.autograd.grad(sum(g.square().sum() for g in grads), tensor, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"fastconv\.disabled\(\)"):
            sum(g.square().sum() for g in grads).backward()
        dout = inputs.dout.requires_grad_()
        (dfirst, *_) = torch.autograd.grad(function(**leaves), wanted[1:], dout, create_graph=True)
        with pytest.raises(RuntimeError, match=r"fastconv\.disabled\(\)"):
            torch.autograd.grad(dfirst.sum(), dout)
        with disabled():
            assert torch.autograd.gradgradcheck(lambda *args: function(*args), tuple(leaves.values()), atol=1e-4)


@every_op
def test_torch_func_runs_the_reference(op):
    inputs = make_inputs(SMALL[op], torch.float64)
    tensors = inputs.tensors
    first = next(iter(tensors))
    function = getattr(ops, op)

    def loss(tensor):
        assert ops.select(op, tensor, *tensors.values()).reason == "a torch.func transform is active"
        return (function(**{**tensors, first: tensor}) * inputs.dout).sum()

    torch.testing.assert_close(torch.func.grad(loss)(tensors[first]), truth_of(op, inputs)[f"d{first}"])
    stacked = torch.stack([tensors[first], tensors[first] + 1])
    mapped = torch.func.vmap(lambda t: function(**{**tensors, first: t}))(stacked)
    torch.testing.assert_close(mapped[1], hub(op).reference(**{**tensors, first: stacked[1]}))


@every_op
def test_saved_tensors_hooks(op):
    inputs = make_inputs(SMALL[op], torch.float32)
    stored = []

    def pack(tensor):
        stored.append(tensor.clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, stored.__getitem__):
        same_bits(on_cpu_kernels(op, inputs), on_cpu_kernels(op, inputs))
    assert stored


@every_op
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(op, reentrant):
    inputs = make_inputs(SMALL[op], torch.float32)

    def checkpointed(**tensors):
        return checkpoint(getattr(ops, op), *tensors.values(), use_reentrant=reentrant)

    plain = on_cpu_kernels(op, inputs)
    leaves = {n: t.detach().requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    with use_backend("cpu"):
        checkpointed(**leaves).backward(inputs.dout)
    same_bits({f"d{n}": t.grad for n, t in leaves.items() if t.requires_grad}, plain)


@every_op
def test_changing_a_saved_tensor_in_place_is_noticed(op):
    inputs = make_inputs(SMALL[op], torch.float32)
    leaves = {n: t.requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    changed = "y" if op == "residual_scale" else "weight"
    with use_backend("cpu"):
        out = getattr(ops, op)(**leaves)
    with torch.no_grad():
        leaves[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def lazy_zeros(*shape) -> torch.Tensor:
    """bfloat16 zeros whose pages take memory only once written."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)


@pytest.mark.slow
@every_op
def test_more_than_2_31_elements(op):
    """Offsets past int32, in bfloat16: only the last rows hold values, everything else stays zero."""
    shape, rows = (1, 16400, 8200, 16), 12
    corner = make_inputs(Case(op, (1, rows, 8200, 16), K=3, without=("bias", "mask")), torch.bfloat16)
    assert np.prod(shape) > 2**31

    def grown(tensor):
        if tensor is None or tensor.shape != corner.dout.shape:
            return tensor
        big = lazy_zeros(*shape)
        big[:, -rows:] = tensor
        return big

    def crop(tensor):
        return tensor[:, 1 - rows :] if tensor.shape == shape else tensor

    big = corner._replace(tensors={n: grown(t) for n, t in corner.tensors.items()}, dout=grown(corner.dout))
    with use_backend("cpu"):
        with torch.no_grad():
            out = getattr(ops, op)(**big.tensors)
            expected = getattr(ops, op)(**corner.tensors)
            assert torch.equal(crop(out), expected[:, 1:])
            del out
        for name in GRADIENTS[op]:
            if big.tensors[name] is not None:
                expected, got = on_cpu_kernels(op, corner, (name,)), run(getattr(ops, op), big, (name,))
                if got[f"d{name}"].shape == shape:
                    assert torch.equal(crop(got[f"d{name}"]), expected[f"d{name}"][:, 1:])
                else:
                    torch.testing.assert_close(got[f"d{name}"], expected[f"d{name}"], rtol=2e-2, atol=1e-2)
                del got
