"""What `patch` did: one Site per (module, op), the live counters behind it, and the table that `print` shows."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..ops import Choice

ASKED_FOR = frozenset({"forced", "FASTCONV_DISABLE", "fastconv.disabled()"})  # eager because the user said so
NOT_PATCHED = "not patched: call fastconv.patch(model)"


class Warned(set):
    """The reasons already warned about, shared by the sites of one model; a deep copy of the model starts anew."""

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Warned())


@dataclass
class Site:
    """One op in one module. `status` is "fused", "native" (torch's own kernel is the better one here) or "declined"."""

    name: str
    type: str
    op: str
    status: str
    reason: str = ""
    backend: str = "-"  # the last one used; "-" before the first call, and for calls that ran inside torch.compile
    fallbacks: Counter = field(default_factory=Counter)  # run-time calls of the original code, by reason
    copies: int = 0  # calls whose input had to be copied to channels_last
    warned: Warned = field(default_factory=Warned, repr=False, compare=False)
    why: str = ""  # that backend, where a call has a choice; "" elsewhere


# Beside the modules and never in their __dict__, which ends in checkpoints.
_sites: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Site]] = weakref.WeakKeyDictionary()


def record(site: Site, choice: Choice, warn: bool = True) -> None:
    """Note one call. A fallback that nobody asked for is counted, and warned about once per model and reason."""
    site.backend, site.why = choice.backend, choice.reason if choice.backend != "eager" else ""
    if choice.backend != "eager" or not choice.reason or choice.reason in ASKED_FOR:
        return
    site.fallbacks[choice.reason] += 1
    if warn and choice.reason not in site.warned:
        site.warned.add(choice.reason)
        warnings.warn(
            f"fastconv: {site.op} in {site.name or 'the model'} ({site.type}) runs the original code: {choice.reason}. "
            "print(fastconv.report(model)) lists every site; patch(strict=True) makes this an error.",
            RuntimeWarning,
            stacklevel=2,
        )


class Report:
    """The sites of a model. Their counters stay live while the model lives."""

    def __init__(self, sites: Iterable[Site]):
        self.sites = list(sites)

    @property
    def fused(self) -> list[Site]:
        return [s for s in self.sites if s.status == "fused"]

    @property
    def native(self) -> list[Site]:
        return [s for s in self.sites if s.status == "native"]

    @property
    def declined(self) -> list[Site]:
        return [s for s in self.sites if s.status == "declined"]

    @property
    def blocks(self) -> tuple[int, int]:
        """(blocks that run fused, blocks recognised). A block counts as fused when none of its sites is declined."""
        blocks = defaultdict(set)
        for site in self.sites:
            blocks[site.name].add(site.status)
        return sum("fused" in b and "declined" not in b for b in blocks.values()), len(blocks)

    def __str__(self) -> str:
        fused, total = self.blocks
        if not total:
            return "fastconv: no block recognised"
        groups: dict[tuple, list[str]] = defaultdict(list)
        for s in self.sites:
            groups[s.op, s.type, s.status, s.backend, s.reason or s.why].append(s.name)
        rows = [("op", "block", "status", "backend", "sites", "reason")]
        for (op, kind, status, backend, reason), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
            rows.append((op, kind, status, backend, str(len(names)), f"{reason} ({where})" if reason else ""))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"fastconv: {fused} of {total} blocks fused"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        fallbacks = Counter()
        for s in self.sites:
            for reason, calls in s.fallbacks.items():
                fallbacks[s.op, reason] += calls
        lines += [f"fallback: {op} ran the original code in {calls} calls: {reason}" for (op, reason), calls in fallbacks.items()]
        copied = sum(s.copies > 0 for s in self.sites)
        if copied:
            lines.append(
                f"hint: {copied} sites had to copy inputs that are not channels_last; model.to(memory_format=torch.channels_last), "
                "and the same for the images, avoids it"
            )
        return "\n".join(lines)

    __repr__ = __str__
