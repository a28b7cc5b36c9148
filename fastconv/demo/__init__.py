"""`fastconv demo`: trains one model twice on real images, as it came and after `fastconv.patch`, and compares the two.

Both runs start from the same weights and see the same batches and the same random streams; their steps alternate in
chunks, so that whatever else the machine does meets both alike. A third run is eager again with one harmless change: how
far it drifts from the first is the yardstick for how far the patched run may.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import patching

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from . import finetune, pretrain
    from .data import Images
    from .run import LAYOUTS, Options, Run, build
except ImportError as error:
    raise ImportError(f'fastconv demo needs {error.name}: pip install "fastconv[demo]"', name=error.name) from error

CHUNK = 4  # steps of one run before the next takes over
ALLOWED = 10  # largest loss difference, in units of the control's
FLOOR = 2.4e-7  # drift that the control is always credited with, relative to the loss: two float32 roundings of the loss itself


@dataclass
class Comparison:
    """The runs, and how they compare."""

    options: Options
    eager: Run
    patched: Run
    control: Run
    control_change: str

    @property
    def speedup(self) -> float:
        return statistics.median(self.eager.seconds) / statistics.median(self.patched.seconds)

    @property
    def difference(self) -> float:
        return largest_difference(self.eager, self.patched)

    @property
    def noise(self) -> float:
        return max(largest_difference(self.eager, self.control), FLOOR * max(map(abs, self.eager.losses)))

    def problems(self) -> list[str]:
        """Why this comparison fails; empty where it holds."""
        report = patching.report(self.patched.model)
        fused, total = report.blocks
        found = []
        if total == 0:
            found.append(f"{self.options.model} has no block that fastconv recognises")
        if fused != total:
            found.append(f"{total - fused} of {total} blocks are not fused: {'; '.join(sorted({s.reason for s in report.declined}))}")
        reasons = {reason for site in report.sites for reason in site.fallbacks}
        if reasons or any(site.backend == "eager" for site in report.fused):
            found.append(f"calls ran eager code: {'; '.join(sorted(reasons)) or 'as FASTCONV_BACKEND or FASTCONV_DISABLE asks'}")
        losses, part = self.patched.losses, max(1, len(self.patched.losses) // 4)
        if self.options.pretrain and not sum(losses[-part:]) < sum(losses[:part]):
            found.append(f"the loss did not fall: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
        if not self.difference <= ALLOWED * self.noise:  # also where it is NaN
            found.append(f"the losses differ by {self.difference:.2e}, more than {ALLOWED} times eager's own noise of {self.noise:.2e}")
        return found


def largest_difference(a: Run, b: Run) -> float:
    return (torch.tensor(a.losses, dtype=torch.float64) - torch.tensor(b.losses, dtype=torch.float64)).abs().max().item()


def prepare(options: Options) -> tuple[Images, nn.Module]:
    """The images, and the unpatched model with stochastic depth and a layer scale that matters. ValueError for a bad option."""
    if options.pretrain:
        return pretrain.prepare(options)
    if options.finetune:
        return finetune.prepare(options)
    data = Images(options.data, options.image_size, options.batch_size, options.seed)
    return data, build(options, len(data.classes))


def start(name: str, model: nn.Module, options: Options, layout: str, **kw) -> Run:
    kind = pretrain.Pretraining if options.pretrain else finetune.FineTuning if options.finetune else Run
    return kind(name, model, options, layout, **kw)


def faster_layout(model: nn.Module, options: Options, batch) -> str:
    """The memory format in which the unpatched model trains faster here."""
    runs = {layout: start(layout, copy.deepcopy(model), options, layout) for layout in LAYOUTS}
    seconds = {layout: [] for layout in LAYOUTS}
    for attempt in range(3):
        for layout, run in runs.items():
            taken = run.rehearse(*batch)
            if attempt > 0:  # the first one warms up
                seconds[layout].append(taken)
    return min(LAYOUTS, key=lambda layout: min(seconds[layout]))


def make_control(model: nn.Module, options: Options, layout: str) -> tuple[Run, str]:
    """Eager again, changed as little as can change its rounding."""
    threads = torch.get_num_threads()
    if torch.device(options.device).type == "cpu" and options.dtype == "float32":
        other = 1 if threads > 1 else 2
        return start("control", model, options, layout, threads=other), f"with {other} thread{'s' * (other > 1)} instead of {threads}"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    return start("control", model, options, layout), "with weights perturbed by 1e-7"


def compare(options: Options, data: Images, model: nn.Module, advance: Callable[[], None] = lambda: None) -> Comparison:
    """Train the three runs side by side, patching `model` for one; `advance` is called after every step of each."""
    first = data.batch(0)
    layout = faster_layout(model, options, first)
    eager = start("eager", copy.deepcopy(model), options, layout)
    control, change = make_control(copy.deepcopy(model), options, layout)
    patching.patch(model)
    patched = start("patched", model, options, "channels_last")
    runs = [eager, patched, control]
    for run in runs:
        run.measure_memory(*first)  # warms up as well
    for first_of_chunk in range(0, options.steps, CHUNK):
        numbers = range(first_of_chunk, min(first_of_chunk + CHUNK, options.steps))
        batches = [data.batch(number) for number in numbers]
        for run in runs:
            for number, batch in zip(numbers, batches):
                run.step(number, *batch)
                advance()
        runs.reverse()
    eager.evaluate(data)
    patched.evaluate(data)
    return Comparison(options, eager, patched, control, change)


def table(result: Comparison) -> Table:
    o, runs = result.options, (result.eager, result.patched)
    where = torch.cuda.get_device_name(o.device) if torch.device(o.device).type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    task = f"{o.model} pretraining" if o.pretrain else f"{o.model} fine-tuning ({o.finetune})" if o.finetune else o.model
    title = f"{task}, {o.dtype}, batch {o.batch_size} of {o.image_size}x{o.image_size}, {o.steps} steps, {where}"
    shown = Table("", *[run.name for run in runs], title=title)
    quartiles = [statistics.quantiles(run.seconds, n=4) for run in runs]
    rows = {
        "images/s": [f"{o.batch_size / q[1]:.1f}" for q in quartiles],
        "step, median (ms)": [f"{1e3 * q[1]:.1f}" for q in quartiles],
        "step, middle half (ms)": [f"{1e3 * q[0]:.1f} to {1e3 * q[2]:.1f}" for q in quartiles],
        "memory of a step, peak (MiB)": [f"{run.peak_bytes / 2**20:.1f}" for run in runs],
        "memory format": [run.layout for run in runs],
        "loss, first and last": [f"{run.losses[0]:.6f}, {run.losses[-1]:.6f}" for run in runs],
        runs[0].score[0]: [run.score[1] for run in runs],
    }
    for name, cells in rows.items():
        shown.add_row(name, *cells)
    return shown


def plot(result: Comparison, path: Path) -> None:
    """Loss curves and step times, as a PNG of 1200 x 450 pixels."""
    figure = Figure(figsize=(12, 4.5), dpi=100, layout="constrained")
    losses, times = figure.subplots(1, 2)
    for run, style in ((result.eager, "o-"), (result.patched, "x--")):
        losses.plot(run.losses, style, label=run.name)
        times.plot([1e3 * s for s in run.seconds], style, label=f"{run.name}, median {1e3 * statistics.median(run.seconds):.0f} ms")
    losses.set(
        xlabel="step", ylabel="training loss", title=f"largest difference {result.difference:.1e} (eager's noise {result.noise:.1e})"
    )
    times.set(xlabel="step", ylabel="step time (ms)", ylim=(0, None), title=f"patched is {result.speedup:.2f}x as fast")
    for axes in (losses, times):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def demo(options: Options, data: Images, model: nn.Module) -> int:
    """Run, show and judge the comparison. Returns the exit status: 0 where it holds."""
    torch.backends.cudnn.benchmark = True  # eager as its users set it up
    console = Console()
    columns = (TextColumn("training eager, patched and control in turn"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=3 * options.steps)
        result = compare(options, data, model, lambda: progress.advance(task))
    if options.pretrain:
        pretrain.draw(result.patched, data, options.output)
    else:
        plot(result, options.output)
    problems = result.problems()
    console.print(table(result))
    lines = [
        str(patching.report(result.patched.model)),
        f"patched is {result.speedup:.2f}x as fast as eager in its faster memory format ({result.eager.layout})",
        f"largest loss difference {result.difference:.1e}; eager {result.control_change} differs from itself by {result.noise:.1e}",
        f"{'images' if options.pretrain else 'curves'}: {options.output}",
        *[f"FAILED: {problem}" for problem in problems],
    ]
    console.print("\n".join(lines), markup=False, highlight=False)
    return 1 if problems else 0
