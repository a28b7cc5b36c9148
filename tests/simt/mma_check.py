"""Holds the tensor cores' convolution to what the op contract does not ask, in a process of its own.

    python -m simt.mma_check LIBRARY ORDER CHECK[:ARGUMENTS] ...

The library is one whose table chooses that kernel for every call it can serve (test_simt_mma.py). Exit status as of check.py.
"""

from __future__ import annotations

import pathlib
import sys

import torch

from fastconv import ops, use_backend
from fastconv.testing import Case, Inputs, check_not_finite, check_op, make_inputs, poisoned, run, truth_of

from .check import lazily
from .hub import simulated

OP = "depthwise_conv"
WARPS, CHANNELS, PAIRS = 8, 16, 22  # of a block; to a tap row of a filter: csrc/cuda/conv_mma.h
HALVES = (torch.bfloat16, torch.float16)


def on_simulator(inputs: Inputs, wanted=None) -> dict[str, torch.Tensor]:
    with use_backend("cuda"), poisoned():
        return run(getattr(ops, OP), inputs, wanted)


def same_bits(left: dict, right: dict, what: str) -> None:
    for name in left.keys() & right.keys():
        assert torch.equal(left[name], right[name]), f"{what}: {name} differs"


def whole(t: torch.Tensor) -> torch.Tensor:
    return torch.randint(-3, 4, t.shape).to(t.dtype)


def integers(simulator, *shapes: str) -> None:
    """NxHxWxCxK of small integers: every sum is exact, and every result the truth rounded once."""
    for shape in shapes:
        *sizes, K = map(int, shape.split("x"))
        torch.manual_seed(sum(sizes))
        case = Case(OP, tuple(sizes), K=K)
        dtype = HALVES[sum(sizes) % 2]
        inputs = make_inputs(case, dtype)
        inputs = inputs._replace(tensors={name: whole(t) for name, t in inputs.tensors.items()}, dout=whole(inputs.dout))
        simulator.counted()
        with simulator.settings(count=True):
            got = on_simulator(inputs)
        launches = simulator.counted()
        assert len(launches) == 4 and launches[0].mma and launches[1].mma, f"{shape}: not on tensor cores"
        for launch in launches[:2]:  # of parameters alone: what a second look reads comes from there too
            few = launch.blocks * WARPS * (2 * -(-CHANNELS * int(K) * PAIRS // (32 * WARPS)) + 2)
            assert launch.sum("accesses", file="csrc/cuda/array.cuh", use="read") <= few, f"{shape}: finite sums were formed twice"
        for name, truth in truth_of(OP, inputs).items():
            wrong = (got[name] != truth.to(got[name].dtype)).sum().item()
            assert not wrong, f"{shape} {dtype}: {name} is wrong in {wrong} of {truth.numel()} places"


def same_in_every_order(simulator) -> None:
    for shape, K in (((3, 17, 9, 40), 7), ((2, 12, 70, 19), 5)):
        inputs = make_inputs(Case(OP, shape, K=K), torch.bfloat16)
        first = on_simulator(inputs)
        for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
            with simulator.settings(**settings):
                same_bits(on_simulator(inputs), first, f"{shape} {settings}")


def any_gradient(simulator) -> None:
    """Each gradient alone, and none, has the bits that it has among all."""
    for shape in ((2, 9, 15, 40), (2, 9, 15, 21)):
        inputs = make_inputs(Case(OP, shape), torch.float16)
        full = on_simulator(inputs)
        for wanted in ((), ("x",), ("weight",), ("bias",)):
            same_bits(on_simulator(inputs, wanted), full, f"{wanted} alone")


def views(simulator) -> None:
    """Tensors that start on any element take the scalar path, to the same bits."""
    inputs = make_inputs(Case(OP, (2, 9, 15, 40)), torch.bfloat16)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    moved = inputs._replace(tensors={name: shifted(t) for name, t in inputs.tensors.items()}, dout=shifted(inputs.dout))
    assert all(t.data_ptr() % 16 for t in moved.tensors.values())
    same_bits(on_simulator(moved), on_simulator(inputs), "shifted views")


def not_finite(simulator, *cases: str) -> None:
    """K-NAME-VALUE-BORDER: one Inf or NaN reaches what the formula says, and nothing else."""
    for item in cases:
        K, name, value, border = item.split("-")
        check_not_finite(Case(OP, (2, 9, 11, 20), K=int(K)), torch.bfloat16, "cuda", name, float(value), border == "border")


def joined(simulator, *cases: str) -> None:
    """NxHxWxC[-wide]: the convolution and its norm in one launch on tensor cores; wide: of a float32 x, as under autocast."""
    for item in cases:
        shape, _, wide = item.partition("-")
        sizes = tuple(map(int, shape.split("x")))
        case = Case("depthwise_conv_norm", sizes, wide=("x", "weight", "norm", "out") if wide else ())
        with simulator.settings(count=True):
            simulator.counted()
            check_op(case, HALVES[sum(sizes) % 2], "cuda")
            launches = simulator.counted()
        files = {line.file for line in launches[0].lines}
        assert "csrc/cuda/depthwise_conv_norm_mma_kernel.cu" in files and launches[0].mma, f"{item}: z and its norm apart"


def joined_bits(simulator) -> None:
    """Saved or not, in any order of threads and on a smaller GPU: the same bits."""
    for shape in ((3, 17, 9, 40), (1, 56, 56, 16)):
        inputs = make_inputs(Case("depthwise_conv_norm", shape), torch.bfloat16)
        with use_backend("cuda"), poisoned():
            first = run(ops.depthwise_conv_norm, inputs)
            for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
                with simulator.settings(**settings):
                    same_bits(run(ops.depthwise_conv_norm, inputs), first, f"{shape} {settings}")
            same_bits(run(ops.depthwise_conv_norm, inputs, ()), first, "nothing saved")


def too_little_shared_memory(simulator) -> None:
    """A GPU whose blocks have less shared memory than a tile takes runs the plain kernel."""
    inputs = make_inputs(Case(OP, (16, 7, 7, 16)), torch.bfloat16)
    for limit, mma in ((99 << 10, False), (163 << 10, True)):
        with simulator.settings(count=True, shared_limit=limit):
            simulator.counted()
            on_simulator(inputs)
            launches = simulator.counted()
        assert [launch.mma > 0 for launch in launches[:2]] == [mma, mma], f"{limit} bytes of shared memory"


def offsets_past_2_31(simulator) -> None:
    """The last tile of more than 2^31 elements comes out as it does alone; only the blocks that end with it run."""
    last = make_inputs(Case(OP, (8, 6, 9, 128), without=("bias",)), torch.bfloat16)  # a tile of 8 images, in 8 blocks
    expected = on_simulator(last)
    images = (2**31 // last.dout.numel() + 5) * 8

    def grown(t):
        return lazily((images, *t.shape[1:]), t) if t is not None and t.shape == last.dout.shape else t

    inputs = last._replace(tensors={name: grown(t) for name, t in last.tensors.items()}, dout=grown(last.dout))
    assert inputs.dout.numel() > 2**31
    with simulator.settings(end_blocks=8), use_backend("cuda"):
        got = run(getattr(ops, OP), inputs)
    for name in ("out", "dx"):
        assert torch.equal(got[name][-8:], expected[name]), f"huge {name}"


CHECKS = {
    f.__name__: f
    for f in (
        integers,
        same_in_every_order,
        any_gradient,
        views,
        not_finite,
        joined,
        joined_bits,
        too_little_shared_memory,
        offsets_past_2_31,
    )
}


def main(library: str, order: str, *wanted: str) -> int:
    torch.set_num_threads(1)
    with simulated(pathlib.Path(library)) as simulator, simulator.settings(order=order):
        for item in wanted:
            name, *arguments = item.split(":")
            try:
                CHECKS[name](simulator, *(arguments[0].split(",") if arguments else ()))
            except (AssertionError, RuntimeError) as error:
                print(f"{item[:80]}: {error}")
                return 3
    print(f"{len(wanted)} checks hold")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
