"""The tensor cores' depthwise convolution in the simulator: exact, in any order, on any size; its tiles, traffic and seeded bugs.

What every op must do is held here too, with a library whose table chooses these kernels wherever they can serve.
"""

import ctypes
import itertools
import math
import re
import runpy
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from simt import build
from simt.build import Bug
from simt.control import ORDERS, SHARED_LIMIT, Simulator
from test_simt_counters import count

from fastconv.testing import CASES

OP = "depthwise_conv"
TABLE = "return s.K == 7 ? 3 * s.pixels() >= slots : s.K == 5 ? 5 * s.pixels() >= 3 * slots : false;"
ALWAYS = Bug("cuda/conv_mma.h", TABLE, "return slots > 0;")
CONTRACT, SANITIZER = 3, 66


def check(module: str, order: str, items, bugs: tuple[Bug, ...] = (), variant: str = "plain") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"simt.{module}", str(build.ops(variant, (ALWAYS, *bugs))), order, *items]
    return subprocess.run(command, env=build.environment(variant), capture_output=True, text=True, timeout=1500)


def holds(result: subprocess.CompletedProcess, count: int) -> None:
    assert result.returncode == 0 and re.match(rf"{count} \w+ hold", result.stdout), result.stdout + result.stderr[-4000:]


# --- the contract


def served(largest: int) -> list[str]:
    """Cases of at most so many elements, as check.py takes them: both dtypes of those that the kernels can serve."""
    return [
        f"{OP}:{i}:{dtype}"
        for i, case in enumerate(CASES[OP])
        if case.K in (5, 7) and 0 < math.prod(case.shape) <= largest and "x" not in case.wide
        for dtype in ("bfloat16", "float16")
    ]


def mixed() -> list[str]:
    """Cases of the norm with a float32 x beside 16-bit products, whose backward these kernels serve too, or with a shortcut."""
    cases = [(i, c) for i, c in enumerate(CASES["depthwise_conv_norm"]) if c.K in (5, 7) and ("x" in c.wide or c.shortcut) and c.shape[0]]
    return [f"depthwise_conv_norm:{i}:{dtype}" for i, _ in cases for dtype in ("bfloat16", "float16")]


every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.mark.parametrize("largest", (3000, pytest.param(10**9, marks=pytest.mark.slow)))
@every_order
def test_values_and_gradients(order, largest):
    items = served(largest) + mixed()
    assert len(items) >= 14
    holds(check("check", order, items), len(items))


@pytest.mark.parametrize(
    ("variant", "order", "largest"),
    (
        ("asan", "forward", 1000),
        ("tsan", "random", 200),
        *(pytest.param(v, o, 10**9, marks=pytest.mark.slow) for v, o in itertools.product(("asan", "tsan"), ORDERS)),
    ),
)
@pytest.mark.timeout(1800)
def test_sanitizers_find_nothing(variant, order, largest):
    items = [item for item in served(largest) + mixed()[-2:] if item.endswith("bfloat16")]
    assert len(items) > 1
    holds(check("check", order, items, variant=variant), len(items))


def test_what_callers_may_do():
    """Order of threads, frozen parameters, views, little shared memory; one block that works on one tile after another."""
    holds(check("mma_check", "forward", ("same_in_every_order", "any_gradient", "views", "too_little_shared_memory")), 4)


def test_float32_maps_under_autocast_reach_the_tensor_cores():
    """A residual stream: dy, x and dx float32, products bfloat16. In units of 2 bytes backward moves dy 2, z 1, dz 1 + 1, x 2, dx 2."""
    found = count("depthwise_conv_norm", (4, 28, 28, 32), wide=("x", "weight", "norm", "out"))["bwd"]
    assert sum(launch.mma > 0 for launch in found.launches) == 1
    assert found.distinct == pytest.approx(3, rel=0.01)  # of the size of the first argument: dy, x and dx
    assert 1.5 <= found.rest <= 1.5 + 0.45  # half as large: z and dz twice; partials of a small batch
    assert not any(launch.mma for launch in count("depthwise_conv", (1, 28, 28, 32), wide=("x", "weight"))["bwd"].launches)


@pytest.mark.slow
def test_offsets_past_2_31():
    holds(check("mma_check", "forward", ["offsets_past_2_31"]), 1)


PLACES = ["-".join(p) for p in itertools.product("75", ("x", "weight", "bias", "dout"), ("nan", "inf"), ("border", "inside"))]


def test_nan_and_inf_stay_where_the_formula_puts_them():
    holds(check("mma_check", "forward", [f"not_finite:{','.join(PLACES)}"]), 1)


# --- every size


def sizes(widths, batches, K: int) -> str:
    """NxHxWxCxK: H other than W, C of 3, 12 or 21."""

    def height(W):
        return (5 * W + 3) % 23 + (2 if (5 * W + 3) % 23 + 1 == W else 1)

    return ",".join(f"{N}x{height(W)}x{W}x{3 + W % 3 * 9}x{K}" for W, N in itertools.product(widths, batches))


SOME = (1, 7, 8, 9, 15, 23, 28, 30, 37, 51, 56, 58, 65)
assert {W % 8 for W in SOME} == set(range(8))


@pytest.mark.parametrize(
    ("order", "widths", "batches", "K"),
    (
        ("forward", SOME, (1,), 7),
        ("reverse", SOME[::5], (17,), 7),
        ("random", SOME[1::4], (2,), 5),
        *(pytest.param(o, range(1, 66), (1, 17), K, marks=pytest.mark.slow) for o, K in itertools.product(ORDERS, (5, 7))),
    ),
)
@pytest.mark.timeout(1800)
def test_integers_are_exact(order, widths, batches, K):
    holds(check("mma_check", order, [f"integers:{sizes(widths, batches, K)}"]), 1)


class Tiles(NamedTuple):
    tall: int
    slabs: int
    across: int
    bands: int
    stacked: int
    rows: int
    pitch: int
    stride: int
    plane: int  # units of 16 bytes, as pitch and stride
    count: int
    passes: int
    forward_bytes: int
    backward_bytes: int
    chosen: int


@pytest.fixture(scope="module")
def tiles():
    library = Simulator(build.probes()).library
    library.probe_mma_tiles.restype = None

    def of(N, H, W, K=7, C=16):
        out = (ctypes.c_int64 * len(Tiles._fields))()
        library.probe_mma_tiles(*map(ctypes.c_int64, (N, H, W, C, K)), out)
        return Tiles(*out)

    return of


# ConvNeXt-T, at the smallest batch that fills sixteen strips.
STAGES = {1: (2, 56, 56, 96), 2: (1, 28, 28, 192), 3: (4, 14, 14, 384), 4: (16, 7, 7, 768)}


def test_tiles_fit(tiles):
    """Strips cover the maps, planes hold them, and a block has the shared memory of sm_80 for it."""
    heights, widths = (1, 6, 7, 8, 14, 20, 21, 28, 50, 56, 200), (1, 7, 8, 9, 16, 24, 40, 56, 65, 130, 500)
    for H, W, N, K in itertools.product(heights, widths, (1, 3, 64), (5, 7)):
        t = tiles(N, H, W, K)
        assert 0 < t.tall * t.slabs <= 16 and t.rows == 7 * t.tall + K - 1
        assert t.across * 8 >= W > (t.across - 1) * 8 and t.bands * t.tall * 7 >= H
        assert t.count * t.slabs >= N * t.bands * t.across > (t.count - 1) * t.slabs
        assert t.plane >= t.stacked * t.rows * (t.slabs // t.stacked + 1) and t.plane >= 7 * t.tall * t.slabs
        assert t.stacked == 1 or (t.slabs == t.stacked * t.across and t.stride >= t.rows * t.pitch)
        assert t.forward_bytes < t.backward_bytes <= SHARED_LIMIT, (H, W, N, K)


def test_the_table(tiles):
    """Every stage of ConvNeXt-T at a batch that fills the strips; neither 3 x 3 taps nor tiles that are mostly empty."""
    for shape in STAGES.values():
        N, H, W, C = shape
        t = tiles(N, H, W, C=C)
        assert t.passes == 2 and t.chosen, shape
        assert tiles(128, H, W, C=C).chosen and tiles(128, H, W, K=5, C=C).chosen and not tiles(128, H, W, K=3, C=C).chosen
    assert not tiles(1, 7, 7).chosen and not tiles(64, 56, 1).chosen and not tiles(1, 1 << 24, 8).chosen


def test_words():
    """warp_any over the lanes; bytes of a word and of the next lane's, picked by the selector's nibbles."""
    v, out = torch.tensor([0x03020100, 0x07060504] + [0] * 29 + [1 << 30], dtype=torch.int32), torch.zeros(4097, 32, dtype=torch.int32)
    assert Simulator(build.probes()).library.probe_words(ctypes.c_void_p(v.data_ptr()), ctypes.c_void_p(out.data_ptr())) == 0
    assert (out[0] == 0x07060504 | 0x03020100 | 1 << 30).all()
    for pick in range(1 << 12):
        expected = sum((pick >> 3 * i & 7) << 8 * i for i in range(4))  # byte k holds k
        assert out[pick + 1, 0].item() == expected


# --- counters


@pytest.mark.parametrize(
    ("stage", "C"), [(s, 32) for s in STAGES] + [pytest.param(s, STAGES[s][3], marks=pytest.mark.slow) for s in STAGES]
)
def test_counters(stage, C):
    N, H, W, _ = STAGES[stage]
    found = count(OP, (N, H, W, C))
    for name, floor, convolutions in (("fwd", 2, 1), ("bwd", 3, 2)):
        traffic = found[name]
        first = traffic.launches[0]
        fma = first.mma_fma / (N * H * W * C) / convolutions
        least = 112 * 8 * math.ceil(W / 8) / W
        shared = {field: first.sum(field, space="shared") for field in ("wavefronts", "ideal")}
        main = [line for line in first.lines if line.space == "shared" and line.accesses >= first.ldmatrix / 4]
        print(
            f"stage {stage} {name}: {fma:.1f} FMA an output of {least:.1f}, distinct {traffic.distinct / floor:.3f}, "
            f"total {traffic.total / floor:.3f}, wavefronts {shared['wavefronts'] / shared['ideal']:.3f}"
        )
        assert least <= fma <= 1.1 * least, fma
        assert floor - 1e-3 <= traffic.distinct <= 1.05 * floor and traffic.total <= 1.6 * floor, traffic[:3]
        assert shared["wavefronts"] <= 1.2 * shared["ideal"]
        assert len(main) > 4 and all(line.wavefronts <= 1.2 * line.ideal for line in main), main


# Batches of ConvNeXt-T's stages that give a block about as many tiles as batch 128 does.
FEW_TILES = {1: (2, 56, 56, 16), 2: (4, 28, 28, 16), 3: (16, 14, 14, 16), 4: (64, 7, 7, 16)}


@pytest.mark.parametrize("stage", [pytest.param(s, marks=() if s == 2 else pytest.mark.slow) for s in FEW_TILES])
def test_the_cost_model_has_these_counters(stage, tiles):
    model = runpy.run_path(str(build.ROOT / "benchmarks" / "cost_model.py"))
    N, H, W, C = FEW_TILES[stage]
    t, found = tiles(N, H, W, C=C), count(OP, FEW_TILES[stage])
    staged = math.ceil(t.stacked * t.rows / (2 * (32 // t.pitch))) * 2
    for kind, name in (("forward", "fwd"), ("backward", "bwd")):
        committed, traffic = model["COUNTERS"][kind, stage], found[name]
        first = traffic.launches[0]
        fma, passes = (n / (N * H * W * C) for n in (first.mma_fma, first.sum("wavefronts", space="shared")))
        print(f"stage {stage} {kind}: rest {traffic.rest:.3f}, {fma:.1f} FMA and {passes:.3f} passes an output")
        assert (committed.activations, committed.rows) == (round(traffic.distinct), staged)
        assert committed.outputs == N * H * W // t.count
        for value, measured in ((committed.rest, traffic.rest), (committed.fma, fma), (committed.passes, passes)):
            assert value == pytest.approx(measured, rel=0.02, abs=0.001)
        prediction = model["predict"](kind, stage)
        assert prediction.memory <= prediction.overlapped < prediction.serial


# --- seeded bugs


MMA, KERNEL, BACKWARD = "cuda/conv_mma.cuh", "cuda/depthwise_conv_mma_kernel.cu", "cuda/depthwise_conv_mma_bwd_kernel.cu"
STORED = "sync_threads();\n    g.wide ? store_centre<T, true>(p.y"
STAGED = "stage_window<T, K, kMmaRows, 2>(p.x, s, g, at, c0, planes);\n    sync_threads();"
EXACT, MANY = "integers:2x9x23x20x7", "integers:17x1x150x5x7,2x17x60x20x5"  # MANY: several tiles to a block, backward


class Fault(NamedTuple):
    bug: Bug
    item: str
    message: str
    module: str = "mma_check"
    variant: str = "plain"


FAULTS = {
    "band one column off": Fault(Bug(MMA, "kMmaPairs + d + 7", "kMmaPairs + d + 8"), EXACT, "out is wrong"),
    "no barrier before storing": Fault(Bug(KERNEL, STORED, STORED.replace("sync_threads();", "")), EXACT, "out is wrong"),
    "no barrier after staging": Fault(  # the windows' places are among what is not there yet
        Bug(KERNEL, STAGED, STAGED.replace("sync_threads();", "")), EXACT, "misaligned 16-byte load|out is wrong"
    ),
    "one partial for all slices": Fault(
        Bug(BACKWARD, "p.partial + slice * s.C * (K * K + 1)", "p.partial"), EXACT, "dweight is wrong|not finite"
    ),
    "outputs over windows that others read": Fault(
        Bug(MMA, "sync_warp();  // every lane has read the plane", ""), f"{OP}:14:bfloat16", "data race", "check", "tsan"
    ),
    "a tile staged over the one before": Fault(Bug(BACKWARD, "sync_threads();  // the tile before has been stored", ""), MANY, "is wrong"),
    "a run that ends in the next band": Fault(
        Bug(MMA, "const bool next = ends && at.column + unit > t.across;", "const bool next = false;"), "integers:1x56x56x16x7", "is wrong"
    ),
    "unused strips count for dbias": Fault(
        Bug(BACKWARD, "k + 8 * i < t.strips() ? 1.0f : 0.0f", "1.0f"), "integers:1x20x20x16x7", "dbias is wrong"
    ),
    "no second look at what is not finite": Fault(
        Bug(MMA, "if (warp_any(!finite(acc))) conv_exactly", "if (false) conv_exactly"), "not_finite:7-x-inf-inside", "out differs"
    ),
    "no second look at sums": Fault(
        Bug(BACKWARD, "warp_any(zero + dbias * 0 != 0)", "warp_any(false)"), "not_finite:7-x-inf-border", "dweight differs"
    ),
    "no gradient of the shortcut": Fault(
        Bug(MMA, "first[i] += add[i], second[i] += next[i];", ";"), "depthwise_conv_norm:28:bfloat16", "dx: rms error", "check"
    ),
    "rows of x one off": Fault(Bug(BACKWARD, "centre + o * 16", "centre + (o + 1) * 16"), EXACT, "dweight is wrong|finite"),
}
QUICK = ("band one column off", "one partial for all slices")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS])
def test_a_seeded_bug_is_caught(name):
    fault = FAULTS[name]
    result = check(fault.module, "forward", [fault.item], (fault.bug,), fault.variant)
    said = result.stdout + result.stderr
    code = SANITIZER if fault.variant == "tsan" else CONTRACT
    assert result.returncode == code and re.search(fault.message, said), (result.returncode, said[-4000:])


@pytest.mark.slow
def test_several_tiles_a_block():
    """Forward too, which only large tensors have."""
    few = Bug(KERNEL, "kBlocks = 1 << 10", "kBlocks = 3")
    holds(check("mma_check", "reverse", [MANY, "same_in_every_order"], (few,)), 2)
    unread = Bug(KERNEL, "sync_threads();  // the tile before has been stored", "")
    result = check("mma_check", "reverse", [MANY], (few, unread))
    assert result.returncode == CONTRACT and "out is wrong" in result.stdout, result.stdout + result.stderr[-4000:]


def test_without_the_bugs_it_passes():
    items = sorted({fault.item for fault in FAULTS.values() if fault.module == "mma_check"})
    holds(check("mma_check", "forward", items), len(items))
