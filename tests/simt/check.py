"""Holds ops on a library of simulated kernels to their contract, in a process of its own.

    python -m simt.check LIBRARY ORDER [OP:INDEX:DTYPE | OP:huge ...]

INDEX: of the case in fastconv.testing.CASES[OP]; `huge`: offsets past 2^31, see below. An item may end with settings of the
simulator, as in OP:huge:cluster=0,shared_limit=20000. Exit status 0: all hold; 3: one does not,
with a line that says which; 66: a sanitizer spoke (build.VARIANTS). Anything else is a crash.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import torch

from fastconv import ops, use_backend
from fastconv.testing import CASES, Case, check_op, make_inputs, run

from .hub import simulated

BLOCKS = 4  # at either end of a grid, which are all that runs on huge tensors: one of each 32 channels


def lazily(shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """Zeros that take no memory, with `values` at the end."""
    tensor = torch.from_numpy(np.zeros(shape, np.int16)).view(torch.bfloat16)
    tensor[-values.shape[0] :] = values
    return tensor


def check_huge(op: str, simulator) -> None:
    """The last image of more than 2^31 elements comes out as it does alone; only the first and last blocks of each kernel run."""
    without = () if op == "global_response_norm" else ("bias", "mask")
    wanted = ("x",) if op == "squeeze_excite" else None  # its layers' gradients are sums over all images
    last = make_inputs(Case(op, (1, 6, 9, 128), K=3, without=without), torch.bfloat16)
    images = 2**31 // last.dout.numel() + 40
    with use_backend("cuda"):
        expected = run(getattr(ops, op), last, wanted)

    def grown(t):
        return lazily((images, *t.shape[1:]), t) if t is not None and t.shape == last.dout.shape else t

    inputs = last._replace(tensors={name: grown(t) for name, t in last.tensors.items()}, dout=grown(last.dout))
    assert inputs.dout.numel() > 2**31
    with simulator.settings(end_blocks=BLOCKS), use_backend("cuda"):
        got = run(getattr(ops, op), inputs, wanted)
    for name in expected.keys() & {"out", "dx", "dy"}:
        assert torch.equal(got[name][-1:], expected[name]), f"{op} huge {name}"


def main(library: str, order: str, *wanted: str) -> int:
    torch.set_num_threads(1)
    with simulated(pathlib.Path(library)) as simulator, simulator.settings(order=order):
        for item in wanted:
            op, *which = item.split(":")
            settings = which.pop().split(",") if "=" in which[-1] else ()
            try:
                with simulator.settings(**{name: int(value) for name, value in (setting.split("=") for setting in settings)}):
                    if which == ["huge"]:
                        check_huge(op, simulator)
                    else:
                        check_op(CASES[op][int(which[0])], getattr(torch, which[1]), "cuda")
            except (AssertionError, RuntimeError) as error:
                print(f"{item}: {error}")
                return 3
    print(f"{len(wanted)} cases hold")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
