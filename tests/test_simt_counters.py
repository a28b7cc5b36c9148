"""Memory traffic and bank conflicts of the CUDA kernels at the four stages of ConvNeXt-T, counted by the simulator in bfloat16.

With E elements an activation takes 2 E bytes. `distinct`: bytes of activations that a kernel touches, each sector once a
launch and use, so that what one launch writes and the next reads back counts twice; `total`: as often as warps ask for it, the
halo of tiles included. Parameters, statistics and partial sums are a column of their own.
"""

import ctypes
from typing import NamedTuple

import numpy as np
import pytest
import torch
from simt import build
from simt.control import Launch, Simulator
from simt.hub import simulated

from fastconv import ops, use_backend
from fastconv.ops._registry import hub
from fastconv.testing import Case, RawCalls, make_inputs, run

STAGES = {1: (1, 56, 56, 96), 2: (1, 28, 28, 192), 3: (1, 14, 14, 384), 4: (2, 7, 7, 768)}
SECTOR = 32
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}  # bytes of a block
# What a pass must move at least, in activations (2 E bytes each): kernels read and write each once. `infer`: forward without
# anything for backward.
FLOORS = {
    "depthwise_conv": {"fwd": 2, "infer": 2, "bwd": 3},
    "depthwise_conv_norm": {"fwd": 3, "infer": 2, "bwd": 6},
    "residual_scale": {"fwd": 3, "infer": 3, "bwd": 3},
}
NO_SHARED = (("residual_scale", "fwd"), ("residual_scale", "infer"))  # passes without shared memory
PARTIALS = {"depthwise_conv": (0,), "depthwise_conv_norm": (0, 1), "residual_scale": (2,)}


class Traffic(NamedTuple):
    distinct: float  # activations
    total: float
    rest: float  # distinct, of everything else
    launches: list[Launch]


def runs_of(sectors: np.ndarray) -> list[np.ndarray]:
    """Neighbouring sectors, which are one allocation."""
    return np.split(sectors, np.flatnonzero(np.diff(sectors) > 2) + 1) if sectors.size else []


def traffic_of(call, launches: list[Launch]) -> Traffic:
    """Traffic of a raw op, in activations: tensors, given or returned or allocated inside, of the size of the first."""
    _, args, results = call
    size = args[0].numel() * args[0].element_size()
    known = [t for t in (*args, *results) if isinstance(t, torch.Tensor) and t.numel()]
    activations = {(t.data_ptr() // SECTOR, -(-(t.data_ptr() + size) // SECTOR)) for t in known if t.numel() * t.element_size() == size}
    touched = np.unique(np.concatenate([launch.sectors[use][:, 0] for launch in launches for use in ("read", "write")]).astype(np.int64))
    inside = np.zeros(touched.size, bool)
    for begin, end in activations:
        inside |= (touched >= begin) & (touched < end)
    for scratch in runs_of(touched[~inside]):
        if abs(scratch.size * SECTOR - size) <= 2 * SECTOR:
            inside |= np.isin(touched, scratch)
    distinct = total = rest = 0
    for launch in launches:
        for pairs in launch.sectors.values():
            mine = inside[np.searchsorted(touched, pairs[:, 0].astype(np.int64))]
            distinct += mine.sum()
            total += int(pairs[mine, 1].sum())
            rest += (~mine).sum()
    return Traffic(distinct * SECTOR / size, total * SECTOR / size, rest * SECTOR / size, launches)


def count(op: str, shape: tuple[int, ...], wanted=None, gpu: str = "sm_90", cluster: int = 1, **case) -> dict[str, Traffic]:
    """Traffic of the forward and of the backward pass; `wanted`: the gradients, by default all; `cluster`: the most blocks of one;
    `case`: what else the Case has."""
    inputs = make_inputs(Case(op, shape, **case), torch.bfloat16)
    with simulated() as simulator, simulator.settings(count=True, shared_limit=SHARED[gpu], cluster=cluster), use_backend("cuda"):
        real, found = RawCalls.__torch_dispatch__, {}

        class Calls(RawCalls):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                simulator.counted()
                result = real(self, func, types, args, kwargs)
                launches = simulator.counted()
                if launches:
                    found[func.__name__.split(".")[0].removeprefix(op + "_")] = traffic_of(self.calls[-1], launches)
                return result

        with Calls():
            run(getattr(ops, op), inputs, wanted)
    assert found.keys() == ({"fwd", "bwd"} if wanted is None else {"fwd"})
    return found


@pytest.fixture(scope="module")
def counted():
    kept = {}

    def get(op, stage):
        if (op, stage) not in kept:
            kept[op, stage] = {**count(op, STAGES[stage]), "infer": count(op, STAGES[stage], ())["fwd"]}
        return kept[op, stage]

    return get


every_op = pytest.mark.parametrize("op", sorted(FLOORS))
every_stage = pytest.mark.parametrize("stage", STAGES)


def check_floor(name: str, traffic: Traffic, floor: int) -> None:
    print(f"{name}: floor {floor}, distinct {traffic.distinct:.3f}, total {traffic.total:.3f}, rest {traffic.rest:.3f}")
    assert floor <= traffic.distinct + 1e-3 and traffic.distinct <= 1.05 * floor, (name, traffic.distinct)
    assert traffic.total <= 1.6 * floor, (name, traffic.total)


@every_op
@every_stage
def test_traffic(op, stage, counted):
    for name, floor in FLOORS[op].items():
        check_floor(f"{op} stage {stage} {name}", counted(op, stage)[name], floor)


@pytest.mark.parametrize("stage", (1, 4))  # on tensor cores, and on CUDA cores
def test_traffic_of_the_shortcut(stage, counted):
    """Backward reads its gradient once, and in no launch of its own."""
    alone, traffic = counted("depthwise_conv_norm", stage)["bwd"], count("depthwise_conv_norm", STAGES[stage], shortcut=True)["bwd"]
    check_floor(f"stage {stage} with the shortcut", traffic, FLOORS["depthwise_conv_norm"]["bwd"] + 1)
    assert len(traffic.launches) == len(alone.launches)
    assert traffic.distinct == pytest.approx(alone.distinct + 1, abs=0.01)


@pytest.mark.parametrize("gpu", ("sm_80", "sm_86"))
@every_stage
def test_traffic_of_the_norm_with_less_shared_memory(gpu, stage):
    traffic = count("depthwise_conv_norm", STAGES[stage], (), gpu)["fwd"]
    apart = (gpu, stage) == ("sm_86", 4)  # no tile of 768 channels keeps four warps busy: z is written, and read back
    check_floor(f"stage {stage} {gpu}", traffic, FLOORS["depthwise_conv_norm"]["infer"] + 2 * apart)
    assert len(traffic.launches) == 1 + apart
    assert all(launch.shared_bytes <= SHARED[gpu] and wavefronts(launch) <= 1.2 for launch in traffic.launches)


@every_op
def test_the_floors_are_those_of_the_geometry(op):
    import fastconv._C as native

    N, H, W, C = 128, 56, 56, 96
    E = N * H * W * C
    shape = (E, 2) if op == "residual_scale" else (N, H, W, C, 7, 2)
    names = {"fwd": f"{op}_bytes", "infer": f"{op}_infer_bytes", "bwd": f"{op}_bwd_bytes"}
    for name, floor in FLOORS[op].items():
        bytes_of = getattr(native, names[name], None) or getattr(native, names["fwd"])  # what is alike has one name
        assert bytes_of(*shape) == floor * 2 * E


@every_op
@every_stage
def test_partials(op, stage, counted):
    """Written once and read once: as many as the geometry says at this batch; at batch 128 at most 5% of the floor, where that
    leaves blocks enough."""
    floats = Simulator(build.probes()).library.probe_partial_floats
    floats.restype = ctypes.c_int64

    def traffic(N):
        shape = (N, *STAGES[stage][1:])
        return sum(2 * 4 * floats(what, *map(ctypes.c_int64, (*shape, 7))) for what in PARTIALS[op]), 2 * int(np.prod(shape))

    partials, activation = traffic(STAGES[stage][0])
    counted_rest = counted(op, stage)["bwd"].rest * activation
    inputs = make_inputs(Case(op, STAGES[stage]), torch.bfloat16).tensors
    parameters = sum(t.numel() * t.element_size() for t in inputs.values() if t is not None and t.numel() * 2 != activation)
    statistics = 2 * 4 * int(np.prod(STAGES[stage][:3])) if op == "depthwise_conv_norm" else 0
    assert partials <= counted_rest + 64 <= partials + 2 * parameters + statistics + 4096  # parameters read, their gradients written
    partials, activation = traffic(128)
    # Stage 4 has 24 chunks of channels: 4 partials would stay below 5% and leave 36 of 132 multiprocessors idle, 5 leave 12.
    most = 0.055 if (op, stage) == ("depthwise_conv", 4) else 0.05
    assert partials <= most * FLOORS[op]["bwd"] * activation, f"{partials / FLOORS[op]['bwd'] / activation:.3f}"


def wavefronts(launch: Launch) -> float:
    """Of shared memory, for each that accesses free of conflicts would take."""
    return launch.sum("wavefronts", space="shared") / max(1, launch.sum("ideal", space="shared"))


@every_op
@every_stage
def test_bank_conflicts(op, stage, counted):
    for name, traffic in counted(op, stage).items():
        for launch in traffic.launches:
            worst = sorted(launch.lines, key=lambda line: line.ideal - line.wavefronts)[:3]
            assert wavefronts(launch) <= 1.2, (name, wavefronts(launch), worst)
        used = max(launch.sum("accesses", space="shared") for launch in traffic.launches)
        assert used > (100 if op == "residual_scale" else 1000) or (op, name) in NO_SHARED


@every_op
def test_schemas_are_all_counted(op):
    assert set(hub(op).SCHEMAS) == {f"{op}_fwd", f"{op}_bwd"}
