"""One training run of the demo, timed step by step."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from ..models import MODELS
from ..zoo import create_model
from .data import Images, seed_all

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYER_SCALE = 0.5  # at its usual 1e-6 the convolutions hardly reach the loss, and errors in them would not show
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    model: str = "convnext_tiny"
    data: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16
    steps: int = 48
    image_size: int = 64
    seed: int = 0
    output: Path = Path("fastconv-demo.png")
    pretrain: bool = False
    finetune: str | None = None  # "linear", "all" or "last-N"
    weights: Path | None = None  # of the model to fine-tune

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"demo: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"demo: batch_size must be even and at least 2 (mixup pairs the images), got {self.batch_size}")
        if self.steps < 2:
            raise ValueError(f"demo: steps must be at least 2, got {self.steps}")
        if self.finetune and not re.fullmatch(r"linear|all|last-[1-9]\d*", self.finetune):
            raise ValueError(f"demo: finetune must be linear, all or last-N with the number of stages N, got {self.finetune!r}")
        if self.finetune and self.pretrain:
            raise ValueError("demo: pretrain and finetune are two demos: choose one")
        if self.weights and not self.finetune:
            raise ValueError("demo: weights are those of a model to fine-tune: add --finetune linear, last-N or all")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"demo: device {self.device!r} was asked for, but torch sees no CUDA device; use --device cpu")


def build(options: Options, classes: int) -> nn.Module:
    """The unpatched model with random weights, stochastic depth and a layer scale that matters."""
    if options.model in MODELS and MODELS[options.model].family == "MAE":
        raise ValueError(f"demo: {options.model} predicts pixels, not classes: use --pretrain")
    try:
        model = _build(options, classes, drop_path_rate=0.1)
    except TypeError as error:  # no such argument: torchvision's models have another and a default of 0.1, many others none
        if "drop_path_rate" not in str(error):
            raise
        model = _build(options, classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("gamma", "layer_scale", "layer_scale_parameter"):
                parameter.fill_(LAYER_SCALE)
    return model.to(options.device).train()


def _build(options: Options, classes: int, **kw) -> nn.Module:
    torch.manual_seed(options.seed)
    return create_model(options.model, fused=False, num_classes=classes, **kw)


@dataclass
class Run:
    """One training run: its model and optimizer, and what was seen of it."""

    name: str
    model: nn.Module
    options: Options
    layout: str
    threads: int = field(default_factory=torch.get_num_threads)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    score: tuple[str, str] = ("", "")  # what evaluate() found
    learning_rate: ClassVar[float] = 2e-4

    def __post_init__(self):
        self.device = torch.device(self.options.device)
        self.dtype = DTYPES[self.options.dtype]
        self.model.to(memory_format=LAYOUTS[self.layout])
        self.criterion = SoftTargetCrossEntropy()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=self.learning_rate, weight_decay=0.05, fused=True
        )
        warmup, steps = max(1, self.options.steps // 6), self.options.steps
        ramp = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / (warmup + 1), total_iters=warmup)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps - warmup))
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [ramp, cosine], [warmup])
        # A scale at which nothing overflows: a step that one run skips and the other takes would end the comparison.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10, enabled=self.dtype == torch.float16)

    def to_device(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device, memory_format=LAYOUTS[self.layout])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            output = self.model(images)
        output = output[0] if type(output) is tuple else output  # the others are of auxiliary heads
        return getattr(output, "logits", output).float()

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.logits(images), labels)

    def forward_backward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.loss(images, labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, number: int, images: torch.Tensor, labels: torch.Tensor) -> None:
        images, labels = self.to_device(images), labels.to(self.device)
        with self.own_threads():
            seed_all(self.options.seed, number)  # stochastic depth draws the same in every run
            synchronize(self.device)
            start = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self.forward_backward(images, labels)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            synchronize(self.device)
            self.seconds.append(time.perf_counter() - start)
            self.schedule.step()
        self.losses.append(loss.item())

    def rehearse(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Seconds of one forward and backward that leave no trace: nothing is learnt from them."""
        images, labels = self.to_device(images), labels.to(self.device)
        with self.own_threads():
            seed_all(self.options.seed, 0)
            synchronize(self.device)
            start = time.perf_counter()
            self.forward_backward(images, labels)
            synchronize(self.device)
            seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        return seconds

    def measure_memory(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Most bytes alive during a forward and backward, beyond what was alive before: activations, workspace, gradients."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.rehearse(images, labels)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler from announcing itself on stderr
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.rehearse(images, labels)
        live = 0
        allocations = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(allocations, key=lambda e: e.start_ns()):
            live += event.nbytes()
            self.peak_bytes = max(self.peak_bytes, live)

    def evaluate(self, data: Images) -> None:
        self.model.eval()
        with torch.inference_mode():
            correct = sum(
                int((self.logits(self.to_device(images)).argmax(1).cpu() == labels).sum()) for images, labels in data.test_batches()
            )
        self.score = "test accuracy", f"{correct / len(data.test):.1%}"

    @contextlib.contextmanager
    def own_threads(self):
        before = torch.get_num_threads()
        if self.threads != before:
            torch.set_num_threads(self.threads)
        yield
        if self.threads != before:
            torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
