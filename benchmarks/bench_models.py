"""One training step and one inference step of a model, as a user would run it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from interleaved import Clock, compiled
from torch import nn

import fastconv

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CHUNK = 16  # images at a time in float64


def randomised(model: nn.Module) -> nn.Module:
    """Scales of the size they have after training: with a fresh layer scale of 1e-6 no error of a block would show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() <= max(p.shape, default=1) and not name.endswith("bias"):
                p.uniform_(0.3, 0.7)
    return model


@contextlib.contextmanager
def without_drops(model: nn.Module):
    """Dropout and stochastic depth let all through: they draw other values for another layout or dtype."""
    rates = [(m, name, m.__dict__[name]) for m in model.modules() for name in ("p", "drop_prob") if isinstance(m.__dict__.get(name), float)]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


class Entrant:
    """A copy of the model, its inputs in its memory format, and the step that is timed."""

    def __init__(self, model: nn.Module, x, target, layout: str, training: bool, fused: bool, compile: bool):
        self.model = copy.deepcopy(model).to(memory_format=LAYOUTS[layout]).train(training)
        if fused:
            report = fastconv.patch(self.model)
            assert report.fused or report.native, f"nothing was patched:\n{report}"
        self.x, self.target, self.layout, self.training = x.to(memory_format=LAYOUTS[layout]), target, layout, training
        self.call = compiled(self.model) if compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def logits(self) -> torch.Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.x.is_cuda):
            return self.call(self.x)

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        logits = self.logits()
        F.cross_entropy(logits.float(), self.target).backward()
        self.outputs = logits.detach()

    def train(self) -> None:
        self.gradients()
        self.optimizer.step()

    def infer(self) -> None:
        with torch.inference_mode():
            self.outputs = self.logits()

    def __call__(self, clock: Clock) -> dict[str, float]:
        return {"step": clock(self.train if self.training else self.infer)[1]}

    def results(self) -> dict[str, torch.Tensor]:
        """Logits, and in training the gradient of each parameter, with nothing dropped."""
        with without_drops(self.model):
            self.gradients() if self.training else self.infer()
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters()} if self.training else {}
        return {"logits": self.outputs, **grads}


def truth(model: nn.Module, x: torch.Tensor, target: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    """The results in float64, a few images at a time: the model must treat each image by itself."""
    model = copy.deepcopy(model).double().train(training)
    logits = []
    for images, classes in zip(x.split(CHUNK), target.split(CHUNK)):
        with torch.set_grad_enabled(training), without_drops(model):
            logits.append(model(images.double()))
        if training:
            (F.cross_entropy(logits[-1], classes, reduction="sum") / len(x)).backward()
            logits[-1] = logits[-1].detach()
    grads = {name: p.grad for name, p in model.named_parameters()} if training else {}
    return {"logits": torch.cat(logits), **grads}


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def gate(entrants: dict[str, Entrant], eager: dict[str, Entrant], exact: dict[str, torch.Tensor]) -> None:
    """Assert the tolerance rule for whole models: 2x the eager model's own error for outputs, 3x for gradients, plus rounding.

    Each against eager in its layout: on a CPU batch norm's statistics are several times less exact in channels_last.
    """
    plains = {layout: entrant.results() for layout, entrant in eager.items()}
    half = next(iter(plains.values()))["logits"].dtype != torch.float32
    for label, entrant in entrants.items():
        plain = plains[entrant.layout]
        for name, actual in entrant.results().items():
            factor, atol = (2, 8e-3 if half else 1e-5) if name == "logits" else (3, 8e-3 if half else 1e-4)
            error, own = relative(actual, exact[name]), relative(plain[name], exact[name])
            assert error <= factor * own + atol, f"{label}: {name}: relative error {error:.2e}, the eager model's is {own:.2e}"


@pytest.mark.parametrize("mode", ("training", "inference"))
def test_model(model_name, mode, pytestconfig, race, clock):
    option = pytestconfig.getoption
    training, smoke = mode == "training", option("--smoke")
    batch, size = (2, 64) if smoke else (option("--batch-size") or (128 if clock.cuda else 8), option("--image-size"))
    torch.manual_seed(0)
    model = randomised(fastconv.create_model(model_name, fused=False)).to(clock.device)
    x = torch.randn(batch, 3, size, size, device=clock.device)
    target = torch.randint(10, (batch,), device=clock.device)

    def entrant(layout: str, fused: bool = False, compile: bool = False) -> Entrant:
        return Entrant(model, x, target, layout, training, fused, compile)

    entrants = {f"eager {layout}": entrant(layout) for layout in LAYOUTS}
    fused = {f"ours {layout}": entrant(layout, fused=True) for layout in LAYOUTS}
    if not option("--no-compile"):  # in the layout that is faster without it
        faster = min(LAYOUTS, key=lambda layout: min(entrants[f"eager {layout}"](clock)["step"] for _ in range(3)))
        entrants["compile"] = entrant(faster, compile=True)
        fused["ours + compile"] = entrant(faster, fused=True, compile=True)
    gate(fused, {layout: entrant(layout) for layout in LAYOUTS}, truth(model, x, target, training))
    dtype = "bfloat16 autocast" if clock.cuda else "float32"
    laps = {label: (lap,) for label, lap in (entrants | fused).items()}
    race(f"{model_name} {batch}x3x{size}x{size} {mode}", laps, 30 * option("--seconds"), dtype=dtype)
