"""Memory traffic and bank conflicts of the CUDA kernels at the four stages of ConvNeXt-T, counted by the simulator in bfloat16.

With E elements an activation takes 2 E bytes. `distinct`: bytes of activations that a kernel touches, each sector once a
launch and use; `total`: as often as warps ask for it, the halo of tiles included. Parameters, statistics and partial sums are
a column of their own.
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
# Activations that the backward must move at least, in activations (2 E bytes each): kernels read and write each once.
BACKWARD = {"depthwise_conv": 3, "depthwise_conv_norm": 6, "residual_scale": 3}
# The norm runs apart and reads z back at once, from the L2 cache on a GPU: floors count x, z and y.
FORWARD = {"depthwise_conv": 2, "depthwise_conv_norm": 3, "residual_scale": 3}
READ_BACK = {"depthwise_conv_norm": 1}  # of those that forward moves, beyond the floor
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


def count(op: str, shape: tuple[int, ...]) -> dict[str, Traffic]:
    """Traffic of the forward and of the backward pass in training."""
    inputs = make_inputs(Case(op, shape), torch.bfloat16)
    with simulated() as simulator, simulator.settings(count=True), use_backend("cuda"):
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
            run(getattr(ops, op), inputs)
    assert found.keys() == {"fwd", "bwd"}
    return found


@pytest.fixture(scope="module")
def counted():
    kept = {}

    def get(op, stage):
        if (op, stage) not in kept:
            kept[op, stage] = count(op, STAGES[stage])
        return kept[op, stage]

    return get


every_op = pytest.mark.parametrize("op", sorted(FORWARD))
every_stage = pytest.mark.parametrize("stage", STAGES)


@every_op
@every_stage
def test_traffic(op, stage, counted):
    forward, backward = counted(op, stage)["fwd"], counted(op, stage)["bwd"]
    read_back = READ_BACK.get(op, 0)
    for name, traffic, floor, extra in (("forward", forward, FORWARD[op], read_back), ("backward", backward, BACKWARD[op], 0)):
        print(
            f"{op} stage {stage} {name}: floor {floor}, distinct {traffic.distinct:.3f}, total {traffic.total:.3f}, rest {traffic.rest:.3f}"
        )
        assert floor + extra <= traffic.distinct + 1e-3 and traffic.distinct <= 1.05 * floor + extra, (name, traffic.distinct)
        assert traffic.total <= 1.6 * floor, (name, traffic.total)


@every_op
def test_the_floors_are_those_of_the_geometry(op):
    import fastconv._C as native

    N, H, W, C = 128, 56, 56, 96
    E = N * H * W * C
    if op == "residual_scale":
        assert native.residual_scale_bytes(E, 2) == FORWARD[op] * 2 * E and native.residual_scale_bwd_bytes(E, 2) == BACKWARD[op] * 2 * E
    else:
        assert getattr(native, f"{op}_bytes")(N, H, W, C, 7, 2) == FORWARD[op] * 2 * E
        assert getattr(native, f"{op}_bwd_bytes")(N, H, W, C, 7, 2) == BACKWARD[op] * 2 * E


@every_op
@every_stage
def test_partials(op, stage, counted):
    """Written once and read once: as many as the geometry says at this batch, at most 5% of the floor at batch 128."""
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
    block = 6 if op == "depthwise_conv" else BACKWARD[op]  # the convolution's are half of a block's 12 E bytes
    assert partials <= 0.05 * block * activation, f"{partials / block / activation:.3f}"


@pytest.mark.parametrize("op", ("depthwise_conv", "depthwise_conv_norm"))  # the loop of residual_scale uses no shared memory
@every_stage
def test_bank_conflicts(op, stage, counted):
    for name, traffic in counted(op, stage).items():
        for launch in traffic.launches:
            wavefronts, ideal = (launch.sum(field, space="shared") for field in ("wavefronts", "ideal"))
            worst = sorted(launch.lines, key=lambda line: line.ideal - line.wavefronts)[:3]
            assert wavefronts <= 1.2 * ideal, (name, wavefronts / ideal, worst)
        assert any(launch.sum("accesses", space="shared") > 1000 for launch in traffic.launches)


@every_op
def test_schemas_are_all_counted(op):
    assert set(hub(op).SCHEMAS) == {f"{op}_fwd", f"{op}_bwd"}
