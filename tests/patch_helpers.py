"""How tests run models and compare them, patched and unpatched."""

import itertools

import torch
from torch.utils._pytree import tree_leaves

from fastconv.patching._module import FastModule, child_at
from fastconv.testing import assert_matches

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2 of a whole float32 model


def randomise_(model, seed=0):
    """Random values of order 1 for scales, norms and biases too: with ConvNeXt's initial gamma of 1e-6 no bug shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() > max(p.shape, default=1):
                p.normal_(std=p[0].numel() ** -0.5, generator=g)
            elif name.endswith(("bias", "beta")):
                p.normal_(std=0.2, generator=g)
            else:
                p.uniform_(0.5, 1.5, generator=g)
    return model


def outputs_of(model, x):
    return [t for t in tree_leaves(model(x)) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def step(model, x, call=None):
    """Outputs of a forward pass, and the gradients of a fixed projection of them, the input's as "input".

    `call` stands in for the model in the forward pass: a compiled form of it, say.
    """
    x = x.detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    outputs = outputs_of(model if call is None else call, x)
    sum((t.double() * direction(t)).sum() for t in outputs).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], {**gradients, "input": x.grad}


def steps(model, batches):
    """`step` of several batches, taken together. Gradients of single numbers make one vector: of one number alone the error has
    no rms, and eager's may be zero by chance."""
    outputs, gradients = zip(*(step(model, x) for x in batches))
    numbers = [n for n, g in gradients[0].items() if g.numel() == 1]
    joined = {n: torch.stack([g[n] for g in gradients]) for n in gradients[0] if n not in numbers}
    if numbers:
        joined["single numbers"] = torch.stack([g[n].reshape(()) for g in gradients for n in numbers])
    return list(itertools.chain(*outputs)), joined


def direction(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def assert_agree(actual, plain, truth=None, dtype=torch.float32):
    """Outputs and gradients of two models: whole-model tolerance in float32, and against float64 the rule of the ops."""
    (outputs, gradients), (plain_outputs, plain_gradients) = actual, plain
    assert gradients.keys() == plain_gradients.keys()
    named = [(f"output {i}", a, b, False) for i, (a, b) in enumerate(zip(outputs, plain_outputs, strict=True))]
    named += [(n, g, plain_gradients[n], True) for n, g in gradients.items()]
    for name, a, b, is_gradient in named:
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name}: {a.shape} {a.dtype}, unpatched {b.shape} {b.dtype}"
        assert b.abs().sum() > 0, f"{name} is zero in the unpatched model: the comparison would show nothing"
        if dtype == torch.float32:
            error, bound = relative(a, b), GRADIENT_TOLERANCE if is_gradient else OUTPUT_TOLERANCE
            assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.0e}"
    if truth is not None:
        true_outputs, true_gradients = truth
        true_values = {**{f"output {i}": t for i, t in enumerate(true_outputs)}, **true_gradients}
        for name, a, b, is_gradient in named:
            assert_matches(a, b, true_values[name], grad=is_gradient, dtype=dtype, name=name)


def fast_blocks(model):
    return [m for m in model.modules() if isinstance(m, FastModule)]


def twins(model, plain):
    """The blocks of `plain` at the places of the patched ones of `model`."""
    return [plain.get_submodule(name) for name, m in model.named_modules() if isinstance(m, FastModule)]


def part(block, name):
    """A part of a patched block, such as its "conv", by the path that the analysis found, or by its own path."""
    return child_at(block, getattr(block._fastconv.layout, name, name))
