"""depthwise_conv_norm joined on tensor cores, in the simulator: any size, any order, its traffic, registers' worth of mma, seeded bugs."""

import itertools
import math
import re
import runpy

import pytest
from simt import build
from simt.build import Bug
from simt.control import ORDERS
from test_simt_counters import SHARED, count, wavefronts
from test_simt_mma import CONTRACT, SANITIZER, check, holds

KERNEL, NORM = "cuda/depthwise_conv_norm_mma_kernel.cu", "cuda/norm_joined.cuh"
EXAMPLE = "joined:2x12x20x24"


def sizes(widths, batches) -> str:
    """NxHxWxC, every third of a float32 x: H other than W, C of 24, 40 or 56."""
    rows = enumerate(itertools.product(widths, batches))
    return ",".join(f"{N}x{(5 * W + 3) % 11 + 9}x{W}x{24 + W % 3 * 16}" + "-wide" * (i % 3 == 0) for i, (W, N) in rows)


@pytest.mark.parametrize("order", [order if order == "forward" else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS])
def test_sizes(order):
    holds(check("mma_check", order, [f"joined:{sizes((5, 8, 17, 33), (1,))},17x7x7x24"]), 1)


@pytest.mark.slow
def test_every_width():
    holds(check("mma_check", "forward", [f"joined:{sizes(range(1, 66), (1,))}", f"joined:{sizes((14, 15), (2, 17))},2x14x7x40"]), 2)


def test_the_same_bits_in_any_order():
    holds(check("mma_check", "forward", ["joined_bits"]), 1)


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow) for v in ("asan", "tsan")])
def test_sanitizers_find_nothing(variant):
    holds(check("mma_check", "random", ["joined:1x9x11x24,2x12x20x40-wide"], variant=variant), 1)


# Stages of ConvNeXt-T whose tile and all its channels fit a block of sm_90, and the bytes of a block that leaves room for two or
# for twice the threads.
STAGES = {1: (1, 56, 56, 96), 2: (2, 28, 28, 192)}


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wide", [(), pytest.param(("x", "weight", "norm", "out"), marks=pytest.mark.slow)], ids=("bfloat16", "autocast"))
def test_traffic(stage, wide):
    """Units: the size of x. Of bfloat16 inference moves x and y, training z too."""
    N, H, W, C = STAGES[stage]
    for wanted, floor in ((None, 3), ((), 2)):
        traffic = count("depthwise_conv_norm", STAGES[stage], wanted, wide=wide)["fwd"]
        (launch,) = traffic.launches
        fma = launch.mma_fma / (N * H * W * C)
        print(
            f"stage {stage} {floor}: distinct {traffic.distinct:.3f}, total {traffic.total:.3f}, rest {traffic.rest:.3f}, {fma:.1f} FMA, "
            f"{wavefronts(launch):.3f} wavefronts, {launch.threads} threads, {launch.shared_bytes} bytes, {launch.blocks} blocks"
        )
        # float32 maps: z, half the size of x, counts to the rest, and a sector of x is asked for twice, the second time in L1
        floor, reads = (2, 1.7 + 0.5 * (wanted is None)) if wide else (floor, 0)
        assert floor <= traffic.distinct + 1e-3 and traffic.distinct <= 1.05 * floor
        assert traffic.total <= 1.6 * floor + reads
        assert wavefronts(launch) <= 1.2
        # 112 an output of whole strips; the last band of four strips of three rows ends where it ends
        assert fma <= 1.11 * 112 * 8 * -(-W // 8) / W * (12 * -(-H // 12) / H)
        assert launch.threads * (1 if launch.threads == 512 else (SHARED["sm_90"] + 1024) // (launch.shared_bytes + 1024)) >= 512


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_cost_model_has_these_counters(stage):
    model = runpy.run_path(str(build.ROOT / "benchmarks" / "cost_model.py"))
    shape = (4, *STAGES[stage][1:])
    traffic, committed, outputs = count("depthwise_conv_norm", shape)["fwd"], model["JOINED"][stage], math.prod(shape)
    (launch,) = traffic.launches
    measured = (traffic.rest, launch.mma_fma / outputs, launch.sum("wavefronts", space="shared") / outputs)
    assert (committed.activations, committed.outputs) == (round(traffic.distinct), outputs // shape[3] // launch.blocks)
    assert (committed.rest, committed.fma, committed.passes) == pytest.approx(measured, rel=0.02)
    for joined in (True, False):
        assert all(p.memory <= p.overlapped <= p.serial for p in model["predict_norm"](stage, joined))


NO_BARRIER = Bug(NORM, "sync_threads();\n  for (int first", "for (int first")
FAULTS = {
    "the norm before z is whole": (NO_BARRIER, "rms error|not finite|misaligned"),
    "pairs of pixels swapped": (Bug(KERNEL, "store_shared(z.at(inside + 1,", "store_shared(z.at(inside ^ 2,"), "rms error|not finite"),
    "channels of the other group": (
        Bug(KERNEL, "static_cast<int64_t>(first + group)", "static_cast<int64_t>(first)"),
        "rms error|not finite",
    ),
    "planes staged over what is not kept yet": (
        Bug(KERNEL, "sync_threads();  // the channels before are in z", ""),
        "rms error|not finite",
    ),
    "rows of another image": (Bug(KERNEL, "(at.n + strip[0]) * g.conv.H", "at.n * g.conv.H"), "rms error|not finite"),
}
ITEMS = {"channels of the other group": "joined:1x12x20x96", "rows of another image": "joined:17x7x7x24"}


@pytest.mark.parametrize("name", [n if n == "pairs of pixels swapped" else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_a_seeded_bug_is_caught(name):
    bug, message = FAULTS[name]
    result = check("mma_check", "reverse", [ITEMS.get(name, EXAMPLE)], (bug,))
    assert result.returncode == CONTRACT and re.search(message, result.stdout), (result.returncode, result.stdout + result.stderr[-4000:])


@pytest.mark.slow
def test_a_race_is_caught():
    result = check("mma_check", "random", ["joined:1x9x11x24"], (NO_BARRIER,), "tsan")
    assert result.returncode == SANITIZER and "data race" in result.stdout + result.stderr


def test_without_the_bugs_it_passes():
    items = [EXAMPLE, *ITEMS.values()]
    holds(check("mma_check", "reverse", items), len(items))
