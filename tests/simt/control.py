"""A loaded simulator library: its settings, its messages and what it counted."""

from __future__ import annotations

import contextlib
import ctypes
import json
import pathlib
from typing import NamedTuple

import numpy as np

ORDERS = ("forward", "reverse", "random")
INVALID_VALUE, INVALID_CONFIGURATION, LAUNCH_FAILURE, INVALID_CLUSTER_SIZE = 1, 9, 719, 912  # CUDA's error codes
SHARED_LIMIT = 163 << 10  # of sm_80


class Line(NamedTuple):
    """What one line of a kernel did in one launch, in accesses of whole warps."""

    file: str
    line: int
    space: str  # "global" or "shared"
    use: str  # "read" or "write"
    accesses: int
    sectors: int  # global: of 32 bytes, each access's own
    wavefronts: int  # shared: passes, with bank conflicts
    ideal: int  # shared: passes without


class Launch(NamedTuple):
    blocks: int
    threads: int  # of a block
    shared_bytes: int  # dynamic
    mma: int  # of whole warps, like ldmatrix
    mma_fma: int  # of all of them
    ldmatrix: int
    lines: tuple[Line, ...]
    sectors: dict[str, np.ndarray]  # by use: rows of (sector number, warp accesses that touched it)

    def sum(self, field: str, **selected) -> int:
        """Sum of a field of `lines` over those whose other fields are as selected."""
        return sum(getattr(line, field) for line in self.lines if all(getattr(line, k) == v for k, v in selected.items()))


class Simulator:
    """The engine inside one shared library. Settings hold for every launch of that library."""

    def __init__(self, path: pathlib.Path):
        self.library = ctypes.CDLL(str(path))
        self.library.simt_message.restype = self.library.simt_counters_json.restype = ctypes.c_char_p
        self.library.simt_sectors.restype = ctypes.c_uint64
        self.library.simt_sectors.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p]
        self.library.simt_configure.argtypes = [
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_int64,
            ctypes.c_uint,
            ctypes.c_uint64,
            ctypes.c_int,
        ]
        self.library.simt_configure.restype = None
        self._settings = {
            "order": "forward",
            "seed": 0,
            "workers": 1,
            "shared_limit": SHARED_LIMIT,
            "cluster": 1,
            "end_blocks": 2**63 - 1,
            "count": False,
        }
        self._set(self._settings)

    def _set(self, settings: dict) -> None:
        self._settings = settings
        self.library.simt_configure(ORDERS.index(settings["order"]), *list(settings.values())[1:])

    @contextlib.contextmanager
    def settings(self, **changed):
        """Inside: order and seed of the threads, OS threads, shared memory of a block, blocks of a cluster, only those at the ends of a
        grid, counting. `cluster`: the most; 0 keeps kernels that would hold their input on the chip from it."""
        if unknown := changed.keys() - self._settings.keys():
            raise TypeError(f"unknown settings {sorted(unknown)}")
        before = self._settings
        self._set({**before, **changed})
        try:
            yield self
        finally:
            self._set(before)

    @property
    def message(self) -> str:
        """Why the last launch failed, or ""."""
        return self.library.simt_message().decode()

    def _sectors(self, launch: int, use: int) -> np.ndarray:
        pairs = np.empty((self.library.simt_sectors(launch, use, None), 2), np.uint64)
        self.library.simt_sectors(launch, use, pairs.ctypes.data)
        return pairs

    def counted(self) -> list[Launch]:
        """The launches counted since the last call, in order."""
        launches = []
        for i, launch in enumerate(json.loads(self.library.simt_counters_json())):
            lines: dict[tuple, list[int]] = {}  # instances of a template are one line
            for line in launch.pop("lines"):
                key = tuple(line[name] for name in Line._fields[:4])
                sums = lines.setdefault(key, [0, 0, 0, 0])
                for j, name in enumerate(Line._fields[4:]):
                    sums[j] += line[name]
            sectors = {use: self._sectors(i, j) for j, use in enumerate(("read", "write"))}
            launches.append(Launch(**launch, lines=tuple(Line(*key, *sums) for key, sums in sorted(lines.items())), sectors=sectors))
        self.library.simt_counters_clear()
        return launches
