"""Timing of several entrants in one run: round by round, in shuffled order, with the noise of the machine watched.

A time means something only beside the others of the same run, and on a machine that others use too a fast moment must
not favour one entrant. So every round runs each entrant once, and is preceded by a calibration call: a round whose
calibration strays by more than 20% from its value alone is dropped. The order is shuffled, not rotated, because what ran
just before matters: a short call finds the caches as its predecessor left them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

STRAY = 0.2
FEWEST = 5  # rounds that must be left for a median to count


class Clock:
    """Milliseconds of one call. On CUDA: by events, after the L2 cache was flushed by 1 GiB of writes, which also lets
    the host run ahead of the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(1 << 30, dtype=torch.uint8, device=device) if self.cuda else None
        size = 4096 if self.cuda else 384
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if self.cuda else torch.float32)
        self._calibrate = lambda: a @ a

    def __call__(self, function: Callable[[], object]) -> tuple[object, float]:
        if not self.cuda:
            start = time.perf_counter()
            result = function()
            return result, (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        result = function()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)

    def calibration(self) -> float:
        return statistics.median(self(self._calibrate)[1] for _ in range(3))

    def bandwidth(self) -> float:
        """Bytes a second of a copy far larger than the caches, read and written bytes both counted; the best of ten."""
        source = torch.ones((2 << 30) if self.cuda else (256 << 20), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e3 * source.numel() / min(self(lambda: target.copy_(source))[1] for _ in range(10))


class Result(NamedTuple):
    """Times of one entrant in one pass."""

    entrant: str
    what: str  # the pass: "inference", "forward", "backward", "step"
    median_ms: float
    spread: float  # interquartile range over the median
    rounds: int
    dropped: int
    noisy: bool  # fewer than FEWEST rounds were quiet: the figures are those of all rounds


Lap = Callable[[Clock], dict[str, float]]  # returns {pass: milliseconds}


class Race:
    """Each entrant has the same number of laps; in a round all run their first lap, then all their second."""

    def __init__(self, clock: Clock, entrants: dict[str, tuple[Lap, ...]]):
        self.clock, self.entrants = clock, entrants
        self._order = random.Random(0)
        self._rounds: list[tuple[float, dict[str, dict[str, float]]]] = []
        for _ in range(2):  # compiles, then warms up
            start = time.perf_counter()
            self._run()
            self._round_s = time.perf_counter() - start
        self.alone = min(clock.calibration() for _ in range(5))

    def rounds_in(self, seconds: float) -> int:
        return max(FEWEST, min(200, int(seconds / self._round_s)))

    def _run(self) -> dict[str, dict[str, float]]:
        names = list(self.entrants)
        times: dict[str, dict[str, float]] = {name: {} for name in names}
        for lap in range(len(self.entrants[names[0]])):
            for name in self._order.sample(names, len(names)):
                times[name] |= self.entrants[name][lap](self.clock)
        return times

    def round(self) -> None:
        self._rounds.append((self.clock.calibration(), self._run()))

    def results(self) -> list[Result]:
        quiet = [times for calibration, times in self._rounds if abs(calibration / self.alone - 1) <= STRAY]
        noisy = len(quiet) < FEWEST
        used = [times for _, times in self._rounds] if noisy else quiet
        rows = []
        for name in self.entrants:
            for what in used[0][name]:
                values = [times[name][what] for times in used]
                median = statistics.median(values)
                low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median,) * 3
                rows.append(Result(name, what, median, (high - low) / median, len(used), len(self._rounds) - len(quiet), noisy))
        return rows


def compiled(function: Callable) -> Callable:
    """torch.compile for the shapes at hand."""
    return torch.compile(function, dynamic=False)
