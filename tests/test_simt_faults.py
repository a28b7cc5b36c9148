"""Seeded bugs of the kinds that only a GPU shows, and then not always: each must turn the simulated contract red.

A bug is a textual edit of the real source, whose code is found exactly once. Exit status 3: the contract was broken and said
so; 66: a sanitizer spoke; a negative one: the process crashed, which counts where the bug reaches far outside of memory.
"""

import re
import subprocess
import sys
from typing import NamedTuple

import pytest
from simt import build
from simt.build import Bug
from simt.control import ORDERS

CONV, BACKWARD = "cuda/depthwise_conv_kernel.cu", "cuda/depthwise_conv_bwd_kernel.cu"
TILE, GENERAL = "cuda/conv_tile.cuh", "cuda/depthwise_conv_general_kernel.cu"
JOINED, NORM = "cuda/depthwise_conv_norm_joined_kernel.cu", "cuda/norm_joined.cuh"
REDUCE, TAIL = "cuda/reduce_kernel.cu", "cuda/residual_scale_kernel.cu"
WINDOW, WINDOWS = "cuda/window_attention_bwd_kernel.cu", "window_attention:13:bfloat16"
CONTRACT, SANITIZER, CRASH = 3, 66, -11
STAGED = """copy_async_wait<0>();
    sync_threads();
    Quad acc[kRun] = {};"""


class Fault(NamedTuple):
    kind: str
    bug: Bug
    item: str  # for simt.check
    message: str  # pattern of what is said
    codes: tuple[int, ...] = (CONTRACT,)
    variant: str = "plain"


def race(kind: str, bug: Bug, item: str) -> Fault:
    return Fault(kind, bug, item, "data race", (SANITIZER,), "tsan")


NO_BARRIER = Bug(CONV, STAGED, STAGED.replace("sync_threads();", ""))
NO_WAIT = Bug(CONV, STAGED, STAGED.replace("copy_async_wait<0>();", ""))
ONE_PARTIAL = Bug(BACKWARD, "p.partial + slice * s.C * (K * K + 1)", "p.partial")
FAULTS = {
    "no barrier after staging": Fault("missing barrier", NO_BARRIER, "depthwise_conv:2:float32", "values are not finite"),
    "no barrier after staging, as a race": race("missing barrier", NO_BARRIER, "depthwise_conv:14:float32"),
    "no barrier in the reduction": Fault(
        "missing barrier", Bug(REDUCE, "sync_threads();", ""), "residual_scale:1:bfloat16", "values are not finite"
    ),
    "no barrier in the reduction, as a race": race("missing barrier", Bug(REDUCE, "sync_threads();", ""), "residual_scale:7:bfloat16"),
    "no wait": Fault("missing wait", NO_WAIT, "depthwise_conv:1:bfloat16", "a thread exits with cp.async in flight"),
    "wait for all but one group": Fault(
        "missing wait",
        Bug(CONV, STAGED, STAGED.replace("wait<0>", "wait<1>").replace("Quad acc", "copy_async_wait<0>();\n    Quad acc")),
        "depthwise_conv:1:bfloat16",
        "values are not finite",
    ),
    "too little shared memory": Fault(
        "overrun",
        Bug(CONV, "(K * K + 1) * kWeightPitch * sizeof(float)", "K * K * kWeightPitch * sizeof(float)"),
        "depthwise_conv:2:float32",
        r"outside of shared memory at conv_tile.cuh:\d+",
    ),
    "channels past the last": Fault(
        "overrun",
        Bug(GENERAL, "if (pixel >= s.pixels() || c >= s.C) continue;", "if (pixel >= s.pixels()) continue;"),
        "depthwise_conv:8:float32",
        "heap-buffer-overflow(.|\n)*conv_general_kernel",
        (SANITIZER,),
        "asan",
    ),
    "a tile staged over the one before": Fault(
        "live-buffer overwrite",
        Bug(BACKWARD, "sync_threads();  // the tile before has been read", ""),
        "depthwise_conv:16:float32",
        "not finite|exceeds",
    ),
    "sums written over a tile": race(
        "live-buffer overwrite",
        Bug(BACKWARD, "if (!p.partial) return;\n  sync_threads();", "if (!p.partial) return;"),
        "depthwise_conv:14:float32",
    ),
    "no barrier before the norm": race(
        "missing barrier", Bug(NORM, "sync_threads();\n  for (int first", "for (int first"), "depthwise_conv_norm:1:float32"
    ),
    "the norm's weights over a tile": race(
        "live-buffer overwrite",
        Bug(JOINED, "sync_threads();  // z is whole, and what was staged has been read", ""),
        "depthwise_conv_norm:1:float32",
    ),
    "chunks staged over those before": race(
        "live-buffer overwrite",
        Bug(JOINED, "sync_threads();  // the chunks before have been read", ""),
        "depthwise_conv_norm:4:bfloat16",
    ),
    "queries staged over keys": race("live-buffer overwrite", Bug(WINDOW, "sync_threads();  // those before have been read", ""), WINDOWS),
    "two warps on one sum of the table": race("missing barrier", Bug(WINDOW, "            if (p.dtable) sync_threads();\n", ""), WINDOWS),
    "32-bit offset of a row": Fault(
        "int32 offset",
        Bug(TAIL, "offset = row * p.C + tile.channel;\n    const bool in", "offset = int(row * p.C + tile.channel);\n    const bool in"),
        "residual_scale:huge",
        "Segmentation fault|residual_scale huge",
        (CRASH, CONTRACT),
    ),
    "32-bit offset of a pixel": Fault(
        "int32 offset",
        Bug(TILE, "const int64_t offset = pixel * C + c;", "const int64_t offset = int(pixel * C + c);"),
        "depthwise_conv:huge",
        "Segmentation fault|depthwise_conv huge",
        (CRASH, CONTRACT),
    ),
    "no gradient of the shortcut": Fault(
        "an argument ignored", Bug(BACKWARD, "g.wide, p.dshortcut);", "g.wide);"), "depthwise_conv_norm:28:float32", "dx: rms error"
    ),
    "no gradient of the shortcut, any K": Fault(
        "an argument ignored", Bug(GENERAL, "if (more.data) sum +=", "if (false) sum +="), "depthwise_conv_norm:31:float32", "dx: rms error"
    ),
    "one partial for all slices": Fault("two blocks on one address", ONE_PARTIAL, "depthwise_conv:2:float32", "dweight|dbias"),
    "one partial for all slices, as a race": race("two blocks on one address", ONE_PARTIAL, "depthwise_conv:2:float32"),
}
KINDS = {"missing barrier", "missing wait", "overrun", "live-buffer overwrite", "int32 offset", "two blocks on one address"}
KINDS |= {"an argument ignored"}


def check(library, variant: str, order: str, *items: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "faulthandler", "-m", "simt.check", str(library), order, *items]
    return subprocess.run(command, env=build.environment(variant), capture_output=True, text=True, timeout=600)


def says(result: subprocess.CompletedProcess, fault: Fault) -> None:
    said = result.stdout + result.stderr
    assert result.returncode in fault.codes and re.search(fault.message, said), (result.returncode, said[-6000:])


def holds(result: subprocess.CompletedProcess, count: int) -> None:
    assert result.returncode == 0 and f"{count} cases hold" in result.stdout, result.stdout + result.stderr[-6000:]


# In reverse the readers of the reduction run last and find every sum: there only TSan sees that the barrier is gone.
IN_ORDER = {("reverse", "no barrier in the reduction")}


@pytest.mark.parametrize(
    ("order", "name"),
    [
        pytest.param(order, name, marks=() if order == "forward" else pytest.mark.slow)
        for order in ORDERS
        for name in FAULTS
        if (order, name) not in IN_ORDER
    ],
)
def test_a_seeded_bug_is_caught(name, order):
    fault = FAULTS[name]
    says(check(build.ops(fault.variant, (fault.bug,)), fault.variant, order, fault.item), fault)


@pytest.mark.parametrize("variant", sorted({fault.variant for fault in FAULTS.values()}))
def test_the_kernels_as_they_are_pass(variant):
    """What turns a mutant red is the mutation."""
    items = sorted({fault.item for fault in FAULTS.values() if fault.variant == variant})
    holds(check(build.ops(variant), variant, "forward", *items), len(items))


def test_every_kind_is_seeded():
    assert {fault.kind for fault in FAULTS.values()} == KINDS


def test_several_tiles_a_block():
    """What only large tensors have: a block of the forward pass that works on one tile after another."""
    few = Bug(CONV, "kBlocks = 1 << 14", "kBlocks = 3")
    items = [
        f"{op}:{case}:{dtype}"
        for op in ("depthwise_conv", "depthwise_conv_norm")
        for case in (3, 4, 7, 16)
        for dtype in ("float32", "float16")
    ]
    holds(check(build.ops("plain", (few,)), "plain", "reverse", *items), len(items))
    unread = Bug(CONV, "sync_threads();  // the tile before has been read", "")
    result = check(build.ops("plain", (few, unread)), "plain", "reverse", *items)
    assert result.returncode == CONTRACT and re.search("not finite|exceeds", result.stdout), result.stdout + result.stderr[-6000:]
