"""What the tests of every bundled family share."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastconv.models import MODELS


def build_meta(name, **kw):
    with torch.device("meta"):
        return MODELS[name].build(**kw)


def smallest_of_each_family():
    """Names, one for each family and set of ops: their code is the family's."""
    smallest = {}
    for spec in sorted(MODELS.values(), key=lambda spec: spec.params):
        smallest.setdefault((spec.module, spec.family, spec.ops), spec.name)
    return list(smallest.values())


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def randomize(model):
    """Weights that let every parameter reach the output: the default layer scale of 1e-6 would hide most of them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(0.5 + 0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def counts(name):
    """(parameters, multiply-accumulates of one image) of a bundled model at its published resolution, on the meta device."""
    model, size = build_meta(name).eval(), MODELS[name].resolution
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, torch.device("meta"):
        output = model(torch.empty(1, 3, size, size))
    assert output.shape == (1, 1000)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def check_counts(name, params, macs):
    """The model has exactly these counts, and its Spec states them rounded."""
    assert counts(name) == (params, macs)
    spec = MODELS[name]
    assert (spec.params, spec.gmacs) == (round(params / 1e6, 2), round(macs / 1e9, 2))


def check_same_logits(ours, theirs, images):
    """Equal weights give equal logits, to 1e-5 relative, in eval mode and float32."""
    with torch.inference_mode():
        expected, got = theirs.eval()(images), ours.eval()(images)
    assert torch.linalg.norm(expected) > 0
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
