"""The tensor cores' grouped convolution in the simulator: exact, in any order, on any size; its tiles, traffic and seeded bugs.

What every op must do is held in test_simt_ops.py, for the calls that these kernels serve: elsewhere torch's own kernel runs.
"""

import itertools
import math
import re
import subprocess
import sys
from typing import NamedTuple

import fastconv._C as native
import pytest
import torch
from simt import build
from simt.build import Bug
from simt.control import ORDERS, SHARED_LIMIT
from simt.hub import NAMESPACE, simulated

from fastconv import ops, use_backend
from fastconv.ops._grouped import ALL, NONE, Shape, choose, cuda_passes
from fastconv.ops._registry import hub
from fastconv.testing import CASES, Case, RawCalls, make_inputs, run

OP = "grouped_conv"
CONTRACT, SANITIZER = 3, 66
WIDTHS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32)  # channels a group, of timm's models


def check(module: str, order: str, items, bugs: tuple[Bug, ...] = (), variant: str = "plain") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"simt.{module}", str(build.ops(variant, bugs)), order, *items]
    return subprocess.run(command, env=build.environment(variant), capture_output=True, text=True, timeout=1500)


def holds(result: subprocess.CompletedProcess, count: int) -> None:
    assert result.returncode == 0 and re.match(rf"{count} \w+ hold", result.stdout), result.stdout + result.stderr[-4000:]


def serves(case: Case) -> bool:
    return case.K == 3 and case.stride in (1, 2) and not case.out and not {"x"} & {*case.wide} and 2 <= case.C // case.groups <= 32


def test_the_contract_reaches_the_kernels():
    """Of the cases that test_simt_ops.py runs in bfloat16, those that the kernels serve: every pass is theirs."""
    widths = set()
    for case in filter(serves, CASES[OP]):
        inputs = make_inputs(case, torch.bfloat16)
        with simulated(), use_backend("cuda"), RawCalls() as recorded:
            run(ops.grouped_conv, inputs)
        if inputs.tensors["x"].is_contiguous():  # in both layouts at once: torch takes it for contiguous
            continue
        called = [(func.namespace, func.__name__.split(".")[0]) for func, *_ in recorded.calls]
        assert called == [(NAMESPACE, f"{OP}_fwd"), (NAMESPACE, f"{OP}_bwd")], case
        widths.add(case.C // case.groups)
    assert widths >= {2, 4, 6, 10, 11, 12, 24, 32}


def test_the_table():
    """Ours from 2 to 24 channels a group in channels_last and 16 bits; forced, whatever they serve; else torch's own."""

    def chosen(width=8, dtype=torch.bfloat16, K=3, stride=1, nhwc=True, side=56, forced=False, out=1, weight=None):
        x = torch.empty(16, 64 * width, side, side, dtype=dtype, memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        w = torch.empty(64 * width * out, width, K, K, dtype=weight or dtype)
        shape = hub(OP).check(x, w, None, stride, 1, 64)
        with simulated(), pytest.MonkeyPatch.context() as patch, use_backend("cuda"):
            patch.setattr("fastconv.ops._registry.is_forced", lambda: forced)
            choice, passes = choose(OP, x, w, None, shape, dtype)
        assert (choice.backend == "cuda") == (passes == ALL) and passes in (ALL, NONE)
        return passes == ALL

    assert all(
        chosen(width, dtype, stride=stride) for width in WIDTHS[:-1] for dtype in (torch.bfloat16, torch.float16) for stride in (1, 2)
    )
    assert chosen(weight=torch.float32)
    for forced in (False, True):
        for declined in ({"K": 5}, {"dtype": torch.float32}, {"stride": 3}, {"nhwc": False}, {"width": 34}, {"stride": (1, 2)}, {"out": 2}):
            assert not chosen(**declined, forced=forced), declined
        for small in ({"width": 32}, {"width": 11}, {"side": 7}):
            assert chosen(**small, forced=forced) == forced, small


def test_the_table_is_that_of_the_kernels():
    """Written twice, in C++ and in Python: at every width and stride, on both sides of each bound."""
    maps = ((1, 8, 8), (2, 56, 57), (3, 1 << 12, 1 << 11), (1, 1, 1 << 14), (1 << 8, 64, 63))
    seen = set()
    for width, groups, (N, H, W), K, stride in itertools.product(range(1, 35), (2, 32, 1 << 15), maps, (1, 3, 5), (1, 2, 3)):
        C = width * groups
        expected = native.cuda_grouped_conv(N, H, W, C, K, stride, K // 2, 1, groups)
        x, w = (torch.empty(1, 1, 1, 1, dtype=torch.bfloat16) for _ in range(2))
        shape = Shape(N, C, H, W, C, K, (stride, stride), (K // 2, 1), groups)
        found = tuple(cuda_passes(x, w, x.dtype, shape, True, forced) == ALL for forced in (True, False))
        assert found == tuple(expected), shape
        seen.add(found)
    assert seen == {(False, False), (True, False), (True, True)}


def test_the_table_takes_symbolic_sizes():
    torch._dynamo.reset()

    def call(x):
        C = x.shape[1]
        shape = Shape(x.shape[0], C, x.shape[2], x.shape[3], C, 3, (1, 1), (1, 1), C // 8)
        return x + 1 if all(cuda_passes(x, x, x.dtype, shape, True, False)) else x - 1

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    for side in (8, 56, 80):
        x = torch.zeros(6, 64, side, side, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), call(x))
    assert call(x).max() == 1
    torch._dynamo.reset()


def test_offsets_are_counted_in_32_bits():
    """Maps of 2^29 elements are declined, and so are 2^20 channels."""

    def served(N, H, W, C, groups):
        return native.cuda_grouped_conv(N, H, W, C, 3, 1, 1, 1, groups)[0]

    assert served(1 << 20, 1 << 10, 1 << 10, 64, 8) and not served(1, 1 << 13, 1 << 10, 64, 8)
    assert served(1, 8, 8, 1 << 19, 1 << 14) and not served(1, 8, 8, 1 << 20, 1 << 15)


@pytest.mark.slow
def test_offsets_past_2_31():
    holds(check("grouped_check", "forward", ["offsets_past_2_31"]), 1)


@pytest.mark.parametrize(("variant", "order"), (("asan", "forward"), ("tsan", "random")))
@pytest.mark.timeout(1800)
@pytest.mark.slow  # test_simt_ops.py has some of these
def test_sanitizers_find_nothing(variant, order):
    items = [f"{OP}:{i}:bfloat16" for i, case in enumerate(CASES[OP]) if serves(case)]
    assert len(items) > 10
    holds(check("check", order, items, variant=variant), len(items))


# --- every size


def sizes(widths, maps, strides=(1, 2)) -> str:
    """NxHxWxCxWIDTHxSTRIDExPAD_HxPAD_W: H other than W, three groups or a few more than a block has, any padding."""
    calls = []
    for i, (width, W, stride) in enumerate(itertools.product(widths, maps, strides)):
        N, H, groups = 1 + i % 3, (5 * W + 3 * i) % 19 + 3, 3 if width > 8 else (5, 64 // width + 1)[i % 2]
        calls.append((N, H, W, width * groups, width, stride, i % 3, (i + 1) % 4))
    return ",".join("x".join(map(str, call)) for call in calls)


PLACES = ["-".join(p) for p in itertools.product(("4", "12"), "12", ("x", "weight", "bias", "dout"), ("nan", "inf"), ("border", "inside"))]
CALLERS = ("same_in_every_order", "any_gradient", "views", f"not_finite:{','.join(PLACES)}")


@pytest.mark.parametrize(
    ("order", "widths", "maps", "others"),
    (
        ("forward", WIDTHS, (3,), CALLERS),
        pytest.param("reverse", WIDTHS[::2], (8,), (), marks=pytest.mark.slow),
        pytest.param("random", WIDTHS[1::2], (17,), (), marks=pytest.mark.slow),
        *(pytest.param(o, (*WIDTHS, 3, 7, 11, 14, 18, 31), (*range(2, 40, 3), 56), CALLERS, marks=pytest.mark.slow) for o in ORDERS),
    ),
)
@pytest.mark.timeout(1800)
def test_every_size(order, widths, maps, others):
    """Integers are exact; the contract for widths that the op's cases have with other filters alone; what callers may do."""
    items = (f"integers:{sizes(widths, maps)}", "contract:8,16,20", *others)
    holds(check("grouped_check", order, items), len(items))


# --- counters


class Counted(NamedTuple):
    shape: tuple[int, ...]
    width: int
    stride: int = 1


def fma_an_output(name: str, width: int, stride: int) -> float:
    """Of all mma, on tiles that are full: groups of 2 and 4 packed, outputs padded to 8 channels, nine taps of slots of 8 inputs."""
    unit = 8 if 8 % width == 0 else width
    parts = math.ceil(unit / 8)
    slots = 9 * parts
    if stride == 1 and unit > 8 and unit % 8 in (2, 4) and (name != "dweight" or parts == 2):  # of a row of taps together
        slots = 3 * (3 * (parts - 1) + math.ceil(3 * (unit % 8) / 8))
    if name == "dweight":  # always whole pairs
        slots = 2 * math.ceil(slots / 2)
    return 8 * slots * 8 * parts / unit


def formula(width: int) -> float:
    """Fewest that an mma with a depth of 16 takes: no input padded but at the end of all taps."""
    unit = max(8, width) if 8 % width == 0 else width
    return 16 * math.ceil(9 * unit / 16) * 8 * math.ceil(unit / 8) / unit


def test_few_products_are_of_padding():
    for width in (*WIDTHS, 18):
        for stride in (1, 2) if width % 8 in (0, 2 * (width == 2), 4 * (width == 4)) else (1,):
            assert fma_an_output("fwd", width, stride) <= 1.13 * formula(width), (width, stride)
            # Of 6 channels no fewer pairs: with one more they would do for 8.
            assert width == 18 or fma_an_output("dweight", width, stride) <= (1.26 if width == 6 else 1.17) * formula(width), (
                width,
                stride,
            )


STAGES = (
    Counted((1, 56, 56, 64), 4),  # ResNeXt-50 32x4d, a block's channels
    Counted((1, 28, 28, 64), 8),
    Counted((2, 14, 14, 64), 16),
    Counted((4, 7, 7, 64), 32),
    Counted((1, 28, 28, 48), 24),  # RegNetY-800MF
    Counted((2, 28, 28, 80), 10),
    Counted((2, 28, 28, 48), 12),
    Counted((2, 28, 28, 60), 20),
    Counted((1, 28, 28, 48), 6),
    Counted((1, 56, 56, 64), 4, 2),
    Counted((2, 28, 28, 48), 24, 2),
)
QUICK_STAGES = (0, 4, 5, 10)
PIECES = "cuda/grouped_conv_mma.cuh"
KERNEL, STRIDED, WGRAD = (f"cuda/grouped_conv_mma_{name}kernel.cu" for name in ("", "strided_", "wgrad_"))


def place(file: str, text: str) -> tuple[str, int]:
    return "csrc/" + file, next(i for i, line in enumerate((build.CSRC / file).read_text().splitlines(), 1) if text in line)


# Passes of shared memory over those without conflicts. Where lanes pick their filters it is once a block, which a whole tile hides;
# words of left channels meet those of eight pixels further on.
CONFLICTS = {
    place(PIECES, "const auto load = [&](int element)"): math.inf,
    place(KERNEL, "a[strip] = load_shared"): 2,
    place(WGRAD, "values[i] = load_shared"): 2,
}


@pytest.mark.parametrize(
    "stage", [s if i in QUICK_STAGES else pytest.param(s, marks=pytest.mark.slow) for i, s in enumerate(STAGES)], ids=str
)
def test_counters(stage):
    inputs = make_inputs(Case(OP, stage.shape, K=3, width=stage.width, stride=stage.stride), torch.bfloat16)
    with simulated() as simulator, simulator.settings(count=True, shared_limit=SHARED_LIMIT), use_backend("cuda"), RawCalls() as recorded:
        simulator.counted()
        run(ops.grouped_conv, inputs)
        launches = simulator.counted()
    (_, (x, *_), (y,)), (_, (dy, _, *_), (dx, *_)) = recorded.calls
    floor = 2 * (x.numel() + y.numel())
    for name, launch, maps in zip(("fwd", "dx", "dweight"), launches, ((x, y), (dy, dx), (x, dy))):
        fma, least = launch.mma_fma / y.numel(), fma_an_output(name, stage.width, stage.stride)
        # Of the maps alone: parameters and partial sums do not count.
        distinct = total = 0
        for pairs, t in itertools.product(launch.sectors.values(), maps):
            inside = pairs[(pairs[:, 0] >= t.data_ptr() // 32) & (pairs[:, 0] < -(-(t.data_ptr() + 2 * t.numel()) // 32))]
            distinct, total = distinct + 32 * len(inside) / floor, total + 32 * int(inside[:, 1].sum()) / floor
        wavefronts = launch.sum("wavefronts", space="shared") / y.numel() * 128
        print(
            f"{stage.width} {name}: {fma:.1f} FMA an output of {least:.0f}, distinct {distinct:.3f}, total {total:.3f}, {wavefronts:.1f} "
            f"wavefronts for 128 outputs, {launch.shared_bytes} bytes, {launch.blocks} blocks"
        )
        assert least - 1e-6 <= fma <= 1.2 * least, (name, fma)
        assert 0.999 <= distinct <= 1.05 and total <= 1.6, (name, distinct, total)
        tiles = [line for line in launch.lines if line.space == "shared"]
        assert len(tiles) >= 3, (name, tiles)
        for line in tiles:
            assert line.wavefronts <= CONFLICTS.get((line.file, line.line), 1.2) * line.ideal, (name, line)


# --- seeded bugs


EXACT, LARGE = "integers:2x17x21x40x4x1x1x1,3x9x7x72x24x1x0x2", "integers:2x19x23x40x8x2x1x0"


class Fault(NamedTuple):
    bug: Bug
    item: str
    message: str
    module: str = "grouped_check"
    variant: str = "plain"


FAULTS = {
    "filters not transposed": Fault(
        Bug(PIECES, "((c + in) * g.width + out - group) * K2 + tap", "((c + out) * g.width + in - group) * K2 + tap"), EXACT, "dx is wrong"
    ),
    "last row of taps lost": Fault(
        Bug(KERNEL, "if constexpr (Slots::kOdd) mma", "if (Slots::kOdd && kh + 1 < K) mma"), EXACT, "out is wrong"
    ),
    "left channels of one tap": Fault(
        Bug(PIECES, "(kw < K ? kw : 0) * GroupedBlock<kParts>::kPitch + channel", "channel"), "integers:2x9x7x30x10x1x1x1", "out is wrong"
    ),
    "row before lost": Fault(Bug(WGRAD, "before[0] = odd[0], before[1] = odd[1];", ""), EXACT, "dweight is wrong"),
    "one partial for all slices": Fault(
        Bug(WGRAD, "p.partial + slice * g.C * (g.width * K * K + 1)", "p.partial"), EXACT, "dweight is wrong|not finite"
    ),
    "no barrier after staging": Fault(
        Bug(STRIDED, "copy_async_wait<0>();\n    sync_threads();", "copy_async_wait<0>();"), LARGE, "is wrong|not finite"
    ),
    "filters under the first tile": Fault(
        Bug(KERNEL, "sync_threads();  // the first tile goes to where the filters are", ""),
        f"{OP}:0:bfloat16",
        "data race",
        "check",
        "tsan",
    ),
    "parity of dx": Fault(Bug(STRIDED, "(Class::row_parity(q) ^ g.pad_h) & 1", "Class::row_parity(q)"), LARGE, "dx is wrong"),
    "no second look at packed groups": Fault(
        Bug(KERNEL, "g.width < g.unit && warp_any(!finite(acc[0]))", "false"), "not_finite:4-1-x-inf-inside", "out differs"
    ),
    "the other image's columns": Fault(
        Bug(PIECES, "const int image = at >= window.image_columns", "const int image = at > window.image_columns"),
        "integers:3x9x7x72x24x1x0x2",
        "is wrong",
    ),
}
QUICK = ("one partial for all slices",)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS])
def test_a_seeded_bug_is_caught(name):
    fault = FAULTS[name]
    result = check(fault.module, "forward", [fault.item], (fault.bug,), fault.variant)
    said = result.stdout + result.stderr
    code = SANITIZER if fault.variant == "tsan" else CONTRACT
    assert result.returncode == code and re.search(fault.message, said), (result.returncode, said[-4000:])


@pytest.mark.slow  # its items are among those of test_every_size
def test_without_the_bugs_it_passes():
    items = sorted({fault.item for fault in FAULTS.values() if fault.module == "grouped_check"})
    holds(check("grouped_check", "forward", items), len(items))
