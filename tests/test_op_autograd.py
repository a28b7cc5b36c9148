"""Ops in autograd: frozen inputs, no grad, second derivatives, torch.func, saved tensors, checkpoints."""

import itertools

import pytest
import torch
from op_helpers import GRADIENTS, SMALL, bound, every_op, half_and_float, on_cpu_kernels, same_bits
from torch.utils.checkpoint import checkpoint

from fastconv import disabled, ops, use_backend
from fastconv.ops._registry import hub
from fastconv.testing import RawCalls, make_inputs, truth_of

pytestmark = pytest.mark.usefixtures("one_thread")


@every_op
@half_and_float
def test_any_subset_of_gradients(op, dtype):
    inputs = make_inputs(SMALL[op], dtype)
    full = on_cpu_kernels(op, inputs)
    for count in range(len(GRADIENTS[op])):
        for wanted in itertools.combinations(GRADIENTS[op], count):
            some = on_cpu_kernels(op, inputs, wanted)
            assert some.keys() == {"out", *("d" + name for name in wanted)}
            same_bits(some, full, op)


@every_op
def test_unneeded_gradients_are_not_computed(op):
    """Each group of gradients that the raw backward can leave out comes back empty."""
    if op == "window_attention":  # one pass over the windows makes all of them
        return
    inputs = make_inputs(SMALL[op], torch.float32)
    for wanted in GRADIENTS[op]:
        with RawCalls() as recorded:
            on_cpu_kernels(op, inputs, (wanted,))
        for func, _, results in recorded.calls:
            if func.__name__.startswith(f"{op}_bwd"):
                names = [result.name for result in func._schema.returns]
                numbers = dict(zip(names, (result.numel() for result in results)))
                assert numbers[f"d{wanted}"] == inputs.tensors[wanted].numel()
                pairs = ("weight", "bias"), ("norm_weight", "norm_bias"), ("w1", "b1"), ("w2", "b2")
                group = dict((*pairs, *(pair[::-1] for pair in pairs))).get(wanted)
                assert all(n == 0 for name, n in numbers.items() if name not in (f"d{wanted}", f"d{group}")), numbers


@every_op
def test_sum_and_unused_results(op):
    """Backward of .sum() arrives with strides 0, of a slice as a padded map; and a leaf may be used twice."""
    inputs = make_inputs(SMALL[op], torch.float32)
    leaves = {n: t.detach().requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    with use_backend("cpu"):
        out = bound(op, inputs)(**leaves)
        out.sum().backward()
        expected = on_cpu_kernels(op, inputs._replace(dout=torch.ones_like(out)))
        same_bits({f"d{n}": t.grad for n, t in leaves.items() if t.requires_grad}, expected, op)


@every_op
@half_and_float
def test_inference_saves_nothing_and_gives_the_bits_of_training(op, dtype):
    inputs = make_inputs(SMALL[op], dtype)
    trained = on_cpu_kernels(op, inputs)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), RawCalls() as recorded:
            result = on_cpu_kernels(op, inputs, ())
        same_bits(result, trained, op)
        (call,) = recorded.calls
        assert [r.numel() > 0 for r in call[2]] == [True] + [False] * (len(call[2]) - 1)
    parameters = {name: t.requires_grad_(name not in inputs.constant) for name, t in inputs.tensors.items()}
    with torch.no_grad(), use_backend("cpu"):
        assert bound(op, inputs)(**parameters).grad_fn is None


@every_op
def test_second_derivatives(op):
    inputs = make_inputs(SMALL[op]._replace(shape=(2, 3, 4, 3), K=3), torch.float64)
    leaves = {n: t.requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    function = bound(op, inputs)
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
    function = bound(op, inputs)

    def loss(tensor):
        assert ops.select(op, tensor, *tensors.values()).reason == "a torch.func transform is active"
        return (function(**{**tensors, first: tensor}) * inputs.dout).sum()

    torch.testing.assert_close(torch.func.grad(loss)(tensors[first]), truth_of(op, inputs)[f"d{first}"])
    stacked = torch.stack([tensors[first], tensors[first] + 1])
    mapped = torch.func.vmap(lambda t: function(**{**tensors, first: t}))(stacked)
    torch.testing.assert_close(mapped[1], hub(op).reference(**{**tensors, first: stacked[1]}, **inputs.options))


@every_op
def test_saved_tensors_hooks(op):
    inputs = make_inputs(SMALL[op], torch.float32)
    stored = []

    def pack(tensor):
        stored.append(tensor.clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, stored.__getitem__):
        same_bits(on_cpu_kernels(op, inputs), on_cpu_kernels(op, inputs), op)
    assert stored


@every_op
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(op, reentrant):
    inputs = make_inputs(SMALL[op], torch.float32)

    def checkpointed(**tensors):
        return checkpoint(bound(op, inputs), *tensors.values(), use_reentrant=reentrant)

    plain = on_cpu_kernels(op, inputs)
    leaves = {n: t.detach().requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    with use_backend("cpu"):
        checkpointed(**leaves).backward(inputs.dout)
    same_bits({f"d{n}": t.grad for n, t in leaves.items() if t.requires_grad}, plain, op)


@every_op
def test_changing_a_saved_tensor_in_place_is_noticed(op):
    inputs = make_inputs(SMALL[op], torch.float32)
    leaves = {n: t.requires_grad_(n not in inputs.constant) for n, t in inputs.tensors.items()}
    changed = {"residual_scale": "y", "squeeze_excite": "w2", "window_attention": "bias_table"}.get(op, "weight")
    with use_backend("cpu"):
        out = bound(op, inputs)(**leaves)
    with torch.no_grad():
        leaves[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
