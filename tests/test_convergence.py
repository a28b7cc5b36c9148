"""Does patching change training? 32 AdamW steps on real images, against what rounding alone does to the unpatched model."""

import copy
import functools
import os
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import fastconv
from fastconv.ops import ResidualScale, _registry

DEVICE = os.environ.get("CONVERGENCE_DEVICE", "cpu")  # gpu-check runs this file again on a GPU, on each backend
BACKEND = os.environ.get("CONVERGENCE_BACKEND", "cpu")
STEPS, BATCH = 32, 16
FACTOR = 10  # patched against control
PERTURBATION = 1e-7  # relative, of every parameter of a control: about one rounding of float32


class Run(NamedTuple):
    losses: torch.Tensor
    parameters: torch.Tensor

    def distance(self, other):
        """Largest difference of a loss on the way, and of a parameter at the end."""
        return torch.stack([(a - b).abs().max() for a, b in zip(self, other)])


@functools.cache
def digits():
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return (images - 0.3).contiguous().to(DEVICE), torch.from_numpy(data.target).to(DEVICE)


@functools.cache
def initial_model():
    """Scales of order 1: with the default layer scale of 1e-6 a wrong convolution moves no loss that anyone would see."""
    torch.manual_seed(0)
    model = timm.models.convnext.ConvNeXt(
        depths=(1, 1, 2, 1), dims=(12, 24, 36, 48), patch_size=2, num_classes=10, drop_path_rate=0.1, ls_init_value=1.0
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.uniform_(0.5, 1)
            elif ".norm." in name:
                p.add_(torch.empty_like(p).uniform_(-0.3, 0.3))
            elif "conv_dw" in name:
                p.normal_(std=1 / 7)
    return model.to(DEVICE)


def train(patched, seed=None):
    """A run from the initial model; `seed` perturbs it first."""
    model = copy.deepcopy(initial_model())
    if seed is not None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + PERTURBATION * torch.randn(p.shape, generator=noise).to(DEVICE))
    if patched:
        ops = [op for op in ("depthwise_conv_norm", "gelu_linear", "residual_scale") if BACKEND in _registry.OPS[op]]
        assert fastconv.patch(model, ops=ops, strict=True).blocks == (5, 5)
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[: STEPS * BATCH].view(STEPS, BATCH).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    torch.manual_seed(2)  # stochastic depth
    losses = []
    for batch in order:
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if patched:
        assert {s.backend for s in fastconv.report(model).fused} == {BACKEND}
    return Run(torch.stack(losses), torch.nn.utils.parameters_to_vector(model.parameters()).detach())


@functools.cache
def unpatched():
    return train(patched=False)


@functools.cache
def control():
    """What perturbations of one rounding do: the largest of three."""
    return torch.stack([train(patched=False, seed=seed).distance(unpatched()) for seed in (10, 11, 12)]).amax(0)


def violations():
    distance = train(patched=True).distance(unpatched())
    print(f"loss and parameters: patched {distance.tolist()}, control {control().tolist()}")
    return [what for what, d, c in zip(("losses", "parameters"), distance, control()) if not d <= FACTOR * c]


@pytest.fixture(autouse=True)
def deterministic(threads, monkeypatch):
    threads(1)  # tiny tensors: more threads only wait for each other
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding would hide what is looked for
    torch.use_deterministic_algorithms(True)
    with fastconv.use_backend(BACKEND):
        yield
    torch.use_deterministic_algorithms(False)


def test_the_run_learns_and_repeats():
    run = unpatched()
    assert run.losses[-4:].mean() < 0.7 * run.losses[:4].mean()
    assert not train(patched=False).distance(run).any()
    assert (control() > 0).all()


def test_patched_run_is_the_unpatched_run():
    assert violations() == []


def zero_gradient(op, index):
    right = _registry.raw

    def raw(name, backend):
        kernel = right(name, backend)
        if name != f"{op}_bwd":
            return kernel

        def broken(*args):
            gradients = kernel(*args)
            return tuple(torch.zeros_like(g) if i == index else g for i, g in enumerate(gradients))

        return broken

    return _registry, "raw", raw


def zero_dshortcut():
    right = ResidualScale.backward

    def backward(ctx, dout):
        dshortcut, *others = right(ctx, dout)
        return torch.zeros_like(dshortcut), *others

    return ResidualScale, "backward", staticmethod(backward)


def mirrored_taps():
    """Flipped in H and W forward and backward alike: a consistent op, and another one."""
    right = _registry.raw

    def raw(name, backend):
        kernel = right(name, backend)
        if name == "depthwise_conv_norm_fwd":
            return lambda x, weight, *rest: kernel(x, weight.flip(2, 3), *rest)
        if name == "depthwise_conv_norm_bwd":

            def backward(dy, x, weight, *rest):
                dx, dweight, *others = kernel(dy, x, weight.flip(2, 3), *rest)
                return dx, dweight.flip(2, 3), *others

            return backward
        return kernel

    return _registry, "raw", raw


FAULTS = {
    "dx": zero_gradient("depthwise_conv_norm", 0),
    "dweight": zero_gradient("depthwise_conv_norm", 1),
    "dbias": zero_gradient("depthwise_conv_norm", 2),
    "dnorm_weight": zero_gradient("depthwise_conv_norm", 3),
    "dnorm_bias": zero_gradient("depthwise_conv_norm", 4),
    "dy": zero_gradient("residual_scale", 0),
    "dgamma": zero_gradient("residual_scale", 1),
    "dshortcut": zero_dshortcut(),
    "mirrored taps": mirrored_taps(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_it_red(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    assert violations(), f"{fault}: training looks right"
