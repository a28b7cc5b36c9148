"""depthwise_conv_norm(..., shortcut=True): x comes back beside y, and backward adds its gradient where it stores dx."""

import itertools

import pytest
import torch
from op_helpers import SMALL, half_and_float, on_cpu_kernels, same_bits
from torch.utils.checkpoint import checkpoint

from fastconv import disabled, ops, use_backend
from fastconv.testing import RawCalls, assert_matches, make_inputs, run, truth_of

pytestmark = pytest.mark.usefixtures("one_thread")
OP = "depthwise_conv_norm"
CASE = SMALL[OP]._replace(shortcut=True)
op = ops.depthwise_conv_norm


def leaves_of(inputs, without=()):
    return {name: t.detach().clone().requires_grad_(name not in without) for name, t in inputs.tensors.items()}


def backward_of(recorded):
    (call,) = [(args, results) for func, args, results in recorded.calls if func.__name__.startswith(f"{OP}_bwd")]
    return call


@half_and_float
def test_one_backward_and_no_sum_of_its_own(dtype):
    """x has one gradient, from one node: autograd has nothing to add."""
    inputs = make_inputs(CASE, dtype)
    leaves = leaves_of(inputs)
    with use_backend("cpu"), RawCalls() as recorded:
        y, shortcut = op(**leaves, shortcut=True)
        assert shortcut.data_ptr() == leaves["x"].data_ptr() and shortcut.grad_fn is y.grad_fn and y.grad_fn is not None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.backward((y, shortcut), (inputs.dout, inputs.dshortcut))
    args, _ = backward_of(recorded)
    assert args[7].data_ptr() == inputs.dshortcut.data_ptr()
    assert not {event.key for event in profile.key_averages()} & {"aten::add", "aten::add_"}
    same_bits({f"d{name}": t.grad for name, t in leaves.items()}, on_cpu_kernels(OP, inputs), OP)


@half_and_float
def test_either_gradient_may_be_missing(dtype):
    inputs = make_inputs(CASE, dtype)
    plain = on_cpu_kernels(OP, make_inputs(SMALL[OP], dtype))
    with use_backend("cpu"):
        leaves = leaves_of(inputs)
        y, shortcut = op(**leaves, shortcut=True)
        only_y = torch.autograd.grad(y, list(leaves.values()), inputs.dout, retain_graph=True)
        same_bits({f"d{name}": grad for name, grad in zip(leaves, only_y)}, plain, OP)
        dx, *others = torch.autograd.grad(shortcut, list(leaves.values()), inputs.dshortcut, retain_graph=True, allow_unused=True)
        assert torch.equal(dx, inputs.dshortcut) and others == [None] * 4
        (dweight,) = torch.autograd.grad((y, shortcut), leaves["weight"], (inputs.dout, inputs.dshortcut))
        assert torch.equal(dweight, plain["dweight"])


def test_the_sum_is_rounded_once():
    """In bfloat16 as near to the truth as one rounding of it."""
    inputs = make_inputs(CASE, torch.bfloat16)
    truth, got = truth_of(OP, inputs)["dx"], on_cpu_kernels(OP, inputs)["dx"].double()
    error, least = (got - truth).square().mean(), (truth.bfloat16().double() - truth).square().mean()
    assert error <= 1.2 * least, (error / least).item()


def test_a_frozen_x_and_calls_without_gradients_return_x_itself():
    inputs = make_inputs(CASE, torch.float32)
    with use_backend("cpu"):
        leaves = leaves_of(inputs, without=("x",))
        with RawCalls() as recorded:
            y, shortcut = op(**leaves, shortcut=True)
            assert shortcut is leaves["x"] and y.requires_grad and not shortcut.requires_grad
            y.backward(inputs.dout)
        args, results = backward_of(recorded)
        assert args[7] is None and results[0].numel() == 0
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                leaves = leaves_of(inputs)
                assert op(**leaves, shortcut=True)[1] is leaves["x"]
    for context in (disabled(), use_backend("eager")):
        with context:
            leaves = leaves_of(inputs)
            assert op(**leaves, shortcut=True)[1] is leaves["x"]


@pytest.mark.parametrize("layout", ("nchw", "strided"))
def test_an_x_of_other_strides_comes_back_contiguous(layout):
    inputs = make_inputs(CASE, torch.float32)
    x = inputs.tensors["x"]
    moved = x.movedim(-1, 1).contiguous().movedim(1, -1) if layout == "nchw" else x.repeat_interleave(2, 2)[:, :, ::2]
    assert not moved.is_contiguous()
    with use_backend("cpu"):
        assert op(**{**leaves_of(inputs), "x": moved.requires_grad_()}, shortcut=True)[1].is_contiguous()
    expected = on_cpu_kernels(OP, inputs)
    same_bits(on_cpu_kernels(OP, inputs._replace(tensors={**inputs.tensors, "x": moved.detach()})), expected, OP)
    turned = inputs.dshortcut.movedim(-1, 1).contiguous().movedim(1, -1)
    for dshortcut, same in ((turned, expected), (inputs.dshortcut[:1, :1, :1].expand_as(x), None)):
        given = inputs._replace(dshortcut=dshortcut)
        same = same or on_cpu_kernels(OP, given._replace(dshortcut=dshortcut.contiguous()))
        same_bits(on_cpu_kernels(OP, given), same, OP)


def test_writing_in_place():
    """Over the view autograd refuses; over x, which backward reads, it notices; what is read from the view may be written to."""
    inputs = make_inputs(CASE, torch.float32)
    leaves = leaves_of(inputs)
    with use_backend("cpu"):
        for x in (leaves["x"], leaves["x"] * 1):
            y, shortcut = op(**{**leaves, "x": x}, shortcut=True)
            with pytest.raises(RuntimeError, match="is being modified inplace"):
                shortcut.add_(1)
            out = y * 2
            out += shortcut  # torchvision's blocks
            out.backward(inputs.dout)
            assert leaves["x"].grad is not None
        x = leaves["x"] * 1
        y, shortcut = op(**{**leaves, "x": x}, shortcut=True)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("compute", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", ("eager", "cpu"))
def test_dtypes_under_autocast(compute, backend):
    """The shortcut and its gradient have the dtype of x, whatever the others have."""
    for flags in itertools.product((False, True), repeat=4):
        wide = tuple(name for name, chosen in zip(("x", "weight", "norm", "out"), flags) if chosen)
        inputs = make_inputs(CASE._replace(wide=wide), compute)
        with use_backend(backend), torch.autocast("cpu", compute):
            got = run(op, inputs)
        eager, truth = run(ops._registry.hub(OP).reference, inputs), truth_of(OP, inputs)
        for name in truth:
            assert_matches(got[name], eager[name], truth[name], grad=name != "out", dtype=compute, name=f"{wide} {name}")


def test_saved_tensor_hooks_checkpoints_and_tensor_hooks():
    inputs = make_inputs(CASE, torch.float32)
    expected = on_cpu_kernels(OP, inputs)
    stored, seen = [], []

    def pack(tensor):
        stored.append(tensor.clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, stored.__getitem__):
        same_bits(on_cpu_kernels(OP, inputs), expected, OP)
    assert stored
    for reentrant in (False, True):
        leaves = leaves_of(inputs)
        x = leaves["x"] * 1
        x.retain_grad()
        x.register_hook(seen.append)
        with use_backend("cpu"):
            results = checkpoint(lambda *args: op(*args, shortcut=True), x, *list(leaves.values())[1:], use_reentrant=reentrant)
            torch.autograd.backward(results, (inputs.dout, inputs.dshortcut))
        same_bits({f"d{name}": t.grad for name, t in leaves.items()}, expected, OP)
        assert torch.equal(x.grad, expected["dx"]) and torch.equal(seen.pop(), expected["dx"]) and not seen  # once, with the sum


def test_second_derivatives_raise():
    inputs = make_inputs(CASE._replace(shape=(2, 3, 4, 3), K=3), torch.float64)
    leaves = leaves_of(inputs)
    with use_backend("cpu"):
        (dx,) = torch.autograd.grad(sum(t.square().sum() for t in op(**leaves, shortcut=True)), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=r"fastconv\.disabled\(\)"):
            dx.sum().backward()
        assert torch.autograd.gradcheck(lambda *args: op(*args, shortcut=True), tuple(leaves.values()))


def test_torch_func_runs_the_reference():
    inputs = make_inputs(CASE, torch.float64)

    def loss(x):
        y, shortcut = op(**{**inputs.tensors, "x": x}, shortcut=True)
        return (y * inputs.dout).sum() + (shortcut * inputs.dshortcut).sum()

    torch.testing.assert_close(torch.func.grad(loss)(inputs.tensors["x"]), truth_of(OP, inputs)["dx"])


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
@half_and_float
def test_nan_and_inf_of_the_shortcut_stay_in_their_place(value, dtype):
    inputs = make_inputs(CASE, dtype)
    inputs.dshortcut[0, 2, 3, 4] = value
    got = on_cpu_kernels(OP, inputs)
    assert not torch.isfinite(got["dx"][0, 2, 3, 4]) and (~torch.isfinite(got["dx"])).sum() == 1
    same_bits({**got, "dx": got["out"]}, {**on_cpu_kernels(OP, make_inputs(CASE, dtype)), "dx": got["out"]}, OP)


def test_the_raw_op_checks_the_gradient():
    """test_op_errors.py damages it in every other way."""
    with RawCalls() as recorded:
        on_cpu_kernels(OP, make_inputs(CASE, torch.float32))
    for func, args, _ in recorded.calls:
        if func.__name__.startswith(f"{OP}_bwd"):
            with pytest.raises(RuntimeError, match="dshortcut must have the dtype of x"):
                func(*args[:7], args[7].bfloat16(), *args[8:])
            return
    pytest.fail("no backward")
