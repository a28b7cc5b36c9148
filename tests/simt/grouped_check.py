"""Holds the tensor cores' grouped convolution to what the op contract does not ask, in a process of its own.

    python -m simt.grouped_check LIBRARY ORDER CHECK[:ARGUMENTS] ...

Exit status as of check.py.
"""

from __future__ import annotations

import itertools
import pathlib
import sys

import torch

from fastconv import ops, use_backend
from fastconv.testing import Case, Inputs, check_not_finite, check_op, make_inputs, poisoned, run, truth_of

from .check import lazily
from .hub import simulated

OP = "grouped_conv"
HALVES = (torch.bfloat16, torch.float16)


def on_simulator(inputs: Inputs, wanted=None) -> dict[str, torch.Tensor]:
    with use_backend("cuda"), poisoned():
        return run(ops.grouped_conv, inputs, wanted)


def same_bits(left: dict, right: dict, what: str) -> None:
    for name in left.keys() & right.keys():
        assert torch.equal(left[name], right[name]), f"{what}: {name} differs"


def whole(t: torch.Tensor) -> torch.Tensor:
    values = torch.randint(-3, 4, t.shape).to(t.dtype)
    return values.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else values


def inputs_of(shape, width: int, stride=1, padding=1, dtype=torch.bfloat16) -> Inputs:
    """Random inputs, x in channels_last."""
    inputs = make_inputs(Case(OP, shape, K=3, width=width, stride=stride, padding=padding), dtype)
    assert not inputs.tensors["x"].is_contiguous(), "such a map is in both layouts"
    return inputs


def integers(simulator, *calls: str) -> None:
    """NxHxWxCxWIDTHxSTRIDExPAD_HxPAD_W of small integers: every sum is exact, and every result the truth rounded once. All passes
    run on tensor cores."""
    for call in calls:
        *shape, width, stride, pad_h, pad_w = map(int, call.split("x"))
        torch.manual_seed(sum(shape))
        dtype = HALVES[sum(shape) % 2]
        inputs = inputs_of(shape, width, stride, (pad_h, pad_w), dtype)
        inputs = inputs._replace(tensors={name: whole(t) for name, t in inputs.tensors.items()}, dout=whole(inputs.dout))
        simulator.counted()
        with simulator.settings(count=True):
            got = on_simulator(inputs)
        launches = simulator.counted()
        assert [launch.mma > 0 for launch in launches] == [True] * 3 + [False] * 2, f"{call}: not on tensor cores"
        for name, truth in truth_of(OP, inputs).items():
            wrong = (got[name] != truth.to(got[name].dtype)).sum().item()
            assert not wrong, f"{call} {dtype}: {name} is wrong in {wrong} of {truth.numel()} places"


def contract(simulator, *widths: str) -> None:
    for width, stride, dtype in itertools.product(map(int, widths), (1, 2), HALVES):
        check_op(Case(OP, (2, 9, 11, 3 * width), K=3, width=width, stride=stride), dtype, "cuda")


def same_in_every_order(simulator) -> None:
    for shape, width, stride in (((3, 17, 21, 40), 4, 1), ((3, 9, 7, 48), 12, 2)):
        inputs = inputs_of(shape, width, stride)
        first = on_simulator(inputs)
        for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
            with simulator.settings(**settings):
                same_bits(on_simulator(inputs), first, f"{shape} {settings}")


def any_gradient(simulator) -> None:
    """Each gradient alone, and none, has the bits that it has among all."""
    for stride in (1, 2):
        inputs = inputs_of((2, 9, 11, 40), 20, stride, dtype=torch.float16)
        full = on_simulator(inputs)
        for wanted in ((), ("x",), ("weight",), ("bias",)):
            same_bits(on_simulator(inputs, wanted), full, f"{wanted} alone")


def views(simulator) -> None:
    """Maps that start on any element, or on any fourth byte, move in smaller pieces, to the same bits."""

    def shifted(t, offset):
        moved = torch.cat([t.new_zeros(offset), (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).flatten()])[offset:]
        return moved.view(t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2) if t.dim() == 4 else moved

    for offset, (width, stride) in itertools.product((1, 2), ((8, 1), (16, 2))):
        inputs = inputs_of((2, 5, 11, 48), width, stride)
        tensors = {name: shifted(t, offset) for name, t in inputs.tensors.items()}
        moved = inputs._replace(tensors=tensors, dout=shifted(inputs.dout, offset))
        assert all(t.data_ptr() % 16 == 2 * offset for t in (moved.tensors["x"], moved.dout))
        same_bits(on_simulator(moved), on_simulator(inputs), f"{width} channels a group, views shifted by {offset}")


def not_finite(simulator, *cases: str) -> None:
    """WIDTH-STRIDE-NAME-VALUE-BORDER: one Inf or NaN reaches what the formula says, and no other group."""
    for item in cases:
        width, stride, name, value, border = item.split("-")
        case = Case(OP, (2, 9, 11, 48), K=3, width=int(width), stride=int(stride))
        check_not_finite(case, torch.bfloat16, "cuda", name, float(value), border == "border")


def offsets_past_2_31(simulator) -> None:
    """The last image of more than 2^31 elements comes out as it does alone; only the blocks that end with it run."""

    def grown(t, images):
        return lazily((images, *t.shape[2:], t.shape[1]), t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    for stride in (1, 2):
        last = inputs_of((1, 14, 16, 128), 4, stride)
        last.tensors["bias"] = None
        expected = on_simulator(last)
        images = 2**31 // last.tensors["x"].numel() + 40

        inputs = last._replace(tensors={**last.tensors, "x": grown(last.tensors["x"], images)}, dout=grown(last.dout, images))
        assert inputs.tensors["x"].numel() > 2**31
        with simulator.settings(end_blocks=2), use_backend("cuda"):
            got = run(ops.grouped_conv, inputs, ("x",))
        for name in ("out", "dx"):
            assert torch.equal(got[name][-1:], expected[name]), f"huge {name}, stride {stride}"


CHECKS = {f.__name__: f for f in (contract, integers, same_in_every_order, any_gradient, views, not_finite, offsets_past_2_31)}


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
