"""What the tests of the plain convolutional families share: counts at their own image channels and classes, BatchNorm's
statistics, a training step, and digits to learn."""

import sklearn.datasets
import torch
import torch.nn.functional as F
from model_helpers import build_meta
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastconv.models import MODELS


def published(value):
    """Two decimals, or three digits below one."""
    return round(value, 2) if value >= 1 else float(f"{value:.3g}")


def check_published(name, params, macs, **kw):
    """The model has exactly these counts at its resolution, and its Spec states them rounded (kw aside)."""
    model, spec = build_meta(name, **kw).eval(), MODELS[name]
    in_chans = next(model.parameters()).shape[1]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, in_chans, spec.resolution, spec.resolution))
    assert (sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2) == (params, macs)
    if not kw:
        assert (spec.params, spec.gmacs) == (published(params / 1e6), published(macs / 1e9))


def randomize(model):
    """Weights and running statistics none of which is 0 or 1, of a scale that neither fades nor grows through the layers."""
    generator = torch.Generator().manual_seed(0)
    norms = {id(p): kind for m in model.modules() if isinstance(m, nn.BatchNorm2d) for kind, p in m.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (norms.get(id(parameter)) == "weight"))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_trains(model, size, batch=4, dead=()):
    """One step: every head takes part, and each parameter but `dead` gets a gradient. Without dropout, whose zeros may hide one."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    in_chans = next(model.parameters()).shape[1]
    outputs = randomize(model).train()(images(batch, in_chans, size, size))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    labels = torch.arange(batch) % outputs[0].shape[1]
    sum(F.cross_entropy(output, labels) for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name in dead or parameter.grad.abs().max() > 0, name


def digits(size, in_chans):
    """Handwritten digits: images (1797, in_chans, size, size), about of zero mean and unit variance, and labels."""
    data, labels = sklearn.datasets.load_digits(return_X_y=True)
    data = torch.tensor(data, dtype=torch.float32).view(-1, 1, 8, 8)
    data = (data - data.mean()) / data.std()
    return F.interpolate(data, (size, size), mode="bilinear").expand(-1, in_chans, -1, -1), torch.tensor(labels)


def check_learns(model, size, steps, batch=32, lr=1e-3, accuracy=0.6):
    """A short training on digits: loss on images not yet seen falls below half of a guess's, and `accuracy` of them are right."""
    in_chans = next(model.parameters()).shape[1]
    x, labels = digits(size, in_chans)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, order = order[:200], order[200:]
    optimizer = torch.optim.Adam(model.parameters(), lr)
    torch.manual_seed(0)
    model.train()
    for step in range(steps):
        batch_indices = order[step * batch % (len(order) - batch) :][:batch]
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch_indices]), labels[batch_indices]).backward()
        optimizer.step()
    with torch.inference_mode():
        logits = model.eval()(x[held_out])
        loss = F.cross_entropy(logits, labels[held_out]).item()
        right = (logits.argmax(1) == labels[held_out]).double().mean().item()
    assert loss < 0.5 * torch.log(torch.tensor(10.0)).item() and right >= accuracy, (loss, right)
