"""The kernels of tests/simt/probes.cu on a GPU and in the simulator: the same bits, or a line that says where not.

    python -m gpu.probes

What the simulator proves of a kernel is worth as much as its twins of the hardware's instructions; this holds each of
them to the hardware. A probe runs the same inputs on one machine and returns what it saw by name.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from simt import build
from simt.control import Simulator

NAN = float("nan")
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REFUSED = (  # grid and block that no GPU takes
    (0, 1, 1, 32, 1, 1),
    (1, 0, 1, 32, 1, 1),
    (1, 65536, 1, 1, 1, 1),
    (1, 1, 65536, 1, 1, 1),
    (1, 1, 1, 1025, 1, 1),
    (1, 1, 1, 0, 1, 1),
    (1, 1, 1, 1, 1, 65),
)


class Seen(NamedTuple):
    """Values of one machine. They are compared bit by bit, but for the payload of a NaN."""

    values: torch.Tensor
    ulps: int = 0  # that two float32 may lie apart: approximations
    judged: bool = True  # False: left open by PTX, so a difference is told and is no fault


class Machine:
    """Runs probe_<name> of a library on a device: the simulator's on "cpu", nvcc's on "cuda"."""

    def __init__(self, library: ctypes.CDLL, device: str, shared_limit: int):
        self.library, self.device, self.shared_limit = library, device, shared_limit

    def code(self, name: str, *args: torch.Tensor | int) -> int:
        """The error code; tensors hold afterwards what the kernel wrote."""
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        moved = {id(t): t.to(self.device) for t in tensors}
        values = (ctypes.c_void_p(moved[id(a)].data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in args)
        code = getattr(self.library, f"probe_{name}")(*values)
        if self.device != "cpu":
            torch.cuda.synchronize()
        for t in tensors:
            t.copy_(moved[id(t)])
        return code

    def __call__(self, name: str, *args: torch.Tensor | int) -> None:
        code = self.code(name, *args)
        if code:
            raise RuntimeError(f"probe_{name} returned error {code} on {self.device}")


def full(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, NAN if dtype.is_floating_point else -1, dtype=dtype)


def floats_of(bits: torch.Tensor) -> torch.Tensor:
    """float32 of 32-bit patterns, given as int64."""
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def hard_floats() -> torch.Tensor:
    """NaN, infinities, denormals, and for each narrower format values on, beside and half way between its own."""
    patterns = torch.arange(1 << 16)
    bf16 = [(patterns << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    half = patterns.to(torch.int16).view(torch.float16).float().view(torch.int32).long() & 0xFFFFFFFF
    above = half.view(2, -1)[:, 1:], half.view(2, -1)[:, :-1]  # neighbours of one sign
    ties = ((floats_of(above[0]).double() + floats_of(above[1]).double()) / 2).float().flatten().view(torch.int32).long() & 0xFFFFFFFF
    fp16 = [half, ties, ties + 1, ties - 1]
    high = torch.randint(1 << 19, (1 << 14,)) << 13
    tf32 = [high + low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)]
    return floats_of(torch.cat([*bf16, *fp16, *tf32]) & 0xFFFFFFFF)


def integers(limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape).float()


# --- what each probe sees


def barriers(run: Machine) -> dict[str, Seen]:
    seen = {}
    for name, n in (("reverse", 64), ("reverse_warp", 32), ("overwrite", 64)):
        y = full(n)
        run(name, torch.randn(n), y, 1)
        seen[name] = Seen(y)
    y = full(64)
    run("early_exit", y)
    return {**seen, "early exit": Seen(y)}


def shuffles(run: Machine) -> dict[str, Seen]:
    y, wide = full(4, 32), full(3, 32, dtype=torch.float64)
    run("shuffles", torch.randn(32), y)
    run("wide_shuffles", torch.randn(32, dtype=torch.float64), wide)
    words = full(4097, 32, dtype=torch.int32)
    run("words", torch.tensor([0x55550000] + [0] * 30 + [0x1234], dtype=torch.int32), words)
    permuted = full(4097, 32, dtype=torch.int32)
    run("words", torch.randint(2**31 - 1, (32,), dtype=torch.int32), permuted)
    names = ("shuffle_xor", "shuffle_down", "shuffle", "warp_sum")
    seen = {name: Seen(row) for name, row in zip(names, y)} | {f"{name} of 8 bytes": Seen(row) for name, row in zip(names, wide)}
    return {**seen, "warp_any": Seen(words[0]), "byte_permute": Seen(permuted[1:])}


def widths(run: Machine) -> dict[str, Seen]:
    """Loads and stores of 2, 4, 8 and 16 bytes in global and shared memory, each without some lanes; strides, a halo."""
    seen = {}
    out = full(30 * 32, dtype=torch.int8)
    run("widths", torch.randint(-128, 128, (30 * 32,), dtype=torch.int8), out)
    for size, start in ((2, 0), (4, 2), (8, 6), (16, 14)):
        seen[f"{size} bytes"] = Seen(out[32 * start : 32 * (start + size)])
    for stride in (1, 5, 8):
        y = full(32)
        run("strided", torch.randn(32 * stride), y, stride)
        seen[f"stride {stride}"] = Seen(y)
    y, sums = full(1000, dtype=torch.bfloat16), full(32)
    run("halo", torch.randn(1000).bfloat16(), y, 1000)
    run("conflict", sums, 32)
    return {**seen, "halo": Seen(y), "dynamic shared memory": Seen(sums)}


def copies(run: Machine) -> dict[str, Seen]:
    """cp.async of 16, 8 and 4 bytes, some filled with zeros, after a wait that leaves a group in flight and after all."""
    x, y, small = torch.randn(2, 32, 4), full(3, 2, 32, 4), full(96)
    run("copies", x, y)
    run("small_copies", torch.randn(96), small)
    return {"first group, one pending": Seen(y[1, 0]), "both groups of 16": Seen(y[2]), "4": Seen(small[:32]), "8": Seen(small[32:])}


def ldmatrix(run: Machine) -> dict[str, Seen]:
    out = full(2, 7, 32, 2, dtype=torch.int32)
    run("ldmatrix", torch.randperm(256).to(torch.int16), out)
    parts = {"x1": slice(0, 1), "x2": slice(1, 3), "x4": slice(3, 7)}
    return {f"{name}{trans}": Seen(out[i, part]) for i, trans in enumerate(("", ".trans")) for name, part in parts.items()}


def mma(run: Machine) -> dict[str, Seen]:
    """Integers whose sums float32 holds: the same bits in any order of adding. How other sums round, and what becomes of
    denormals, PTX leaves open."""
    seen = {}
    # Operands of all bits of mantissa; 16 (8) products below 2^20.
    for name, dtype, k, left, right in (
        ("bf16", torch.bfloat16, 16, 256, 255),
        ("fp16", torch.float16, 16, 2047, 31),
        ("tf32", torch.float32, 8, 2047, 63),
    ):
        special = integers(4, 16, k)
        special[2, 3], special[5, 1], special[7, 0] = torch.inf, NAN, -torch.inf
        tiny = integers(7, 16, k) * torch.finfo(dtype).smallest_normal / 8
        for what, a, b in (
            ("", integers(left, 16, k), integers(right, k, 8)),
            (" with NaN and Inf", special, integers(4, k, 8)),
            (" on random numbers", torch.randn(16, k), torch.randn(k, 8)),
            (" on denormals", tiny, integers(7, k, 8)),
        ):
            ways = {", fragments by the layout": (0, 0), ", fragments by ldmatrix": (1, 0), ", in two halves": (1, 1)}
            for way, options in ways.items() if name != "tf32" else [("", ())]:
                c = full(16, 8)
                run(f"mma_{name}", a.to(dtype), b.to(dtype), c, *options)
                seen[f"{name}{what}{way}"] = Seen(c, judged=what in ("", " with NaN and Inf"))
    return seen


def conversions(run: Machine) -> dict[str, Seen]:
    x = hard_floats()
    n = x.numel()
    bits, back = full(2, n, dtype=torch.int16), full(3, n)
    run("conversions", x, bits, back, n)
    partner = x[torch.randperm(n)]
    pairs, out = full(3, n, dtype=torch.int32), full(6, n)
    run("arithmetic", x, partner, pairs, out, n)
    wide = full(2, 1 << 16)
    run("widen", wide)
    normal = x.abs() < 100  # powers that are no denormals
    near_one = (x > 0.5) & (x < 2)
    special = ~(x.isfinite() & (x.abs() >= torch.finfo(torch.float32).smallest_normal) & (x > 0))
    return {
        "float to bf16": Seen(bits[0].view(torch.bfloat16)),
        "float to fp16": Seen(bits[1].view(torch.float16)),
        "float to bf16 and back": Seen(back[0]),
        "float to fp16 and back": Seen(back[1]),
        "float to tf32": Seen(back[2]),
        "two floats to bf16": Seen(pairs[0].view(torch.bfloat16)),
        "two floats to fp16": Seen(pairs[1].view(torch.float16)),
        "float_bits": Seen(pairs[2]),
        "bf16 to float": Seen(wide[0]),
        "fp16 to float": Seen(wide[1]),
        "rsqrt": Seen(out[0][~special], ulps=3),  # 2 of the hardware's, 1 of a division after a root
        "rsqrt of zero, NaN, Inf, negatives, denormals": Seen(out[0][special], ulps=3),
        "sqrtf": Seen(out[1]),
        "fmaf": Seen(out[2]),
        "exp2": Seen(out[3][normal], ulps=3),  # 2 of the hardware's, 1 of the simulator's
        "exp2 of NaN, Inf, what is far from 0": Seen(out[3][~normal], ulps=3),
        "reciprocal": Seen(out[4], ulps=2),
        "log2": Seen(out[5][~special & ~near_one], ulps=3),
        "log2 near 1": Seen(out[5][near_one], judged=False),  # where its error is absolute
        "log2 of zero, NaN, Inf, negatives, denormals": Seen(out[5][special], ulps=3),
    }


def atomics(run: Machine) -> dict[str, Seen]:
    order, sums = full(2, 64, dtype=torch.int32), torch.zeros(64)
    run("order", torch.zeros(1, dtype=torch.int32), order, 64)
    run("one_address", sums, 1000, 1)
    partial, ticket, total = full(500), torch.zeros(1, dtype=torch.int32), full(1)
    run("last_block", torch.randn(500, 32), partial, ticket, total, 500)
    return {
        "tickets": Seen(order.sort(dim=1).values),
        "float": Seen(sums),
        "ticket of unsigned": Seen(ticket),
        "last block": Seen(torch.cat([partial, total])),
    }


def launches(run: Machine) -> dict[str, Seen]:
    """Indices of a grid in three dimensions; shared memory above 48 KiB; what a launch refuses, and that the next one runs."""
    where = full(3 * 2 * 4, 2 * 3 * 5, dtype=torch.int32)
    run("where", where, 3, 2, 4, 2, 3, 5, 0)
    seen = {"indices": Seen(where)}
    for kib in (40, 64, run.shared_limit >> 10):
        words = kib << 8
        out = full(words, dtype=torch.int32)
        run("dynamic", torch.randint(2**31 - 1, (words,), dtype=torch.int32), out, words)
        seen[f"{kib} KiB of shared memory"] = Seen(out)
    out = full(2048, dtype=torch.int32)
    codes = [run.code("where", out, *dims, 0) for dims in REFUSED]
    over = [run.code("limit", full(64), run.shared_limit + extra) for extra in (1, 0, -4095, -4096)]  # 4 KiB more are static
    codes, after = torch.tensor(codes + over), full(32)
    run("strided", torch.ones(32), after, 1)
    return {
        **seen,
        "refused launches": Seen(codes != 0),
        "their codes": Seen(codes, judged=False),
        "untouched": Seen(out),
        "the launch after": Seen(after),
        "shared_memory_limit": Seen(torch.tensor(run.library.probe_shared_memory_limit())),
    }


def clusters(run: Machine) -> dict[str, Seen]:
    """Blocks that read each other's shared memory; of 16 only where so many multiprocessors stand together."""
    seen = {}
    for blocks in (1, 2, 4, 8, 16):
        y = full(2 * blocks, 64)
        if run.library.probe_clusters_that_fit(ctypes.c_int64(blocks)):
            run("cluster", torch.randn(2 * blocks, 64), y, 2 * blocks, blocks, 1, 1)
        seen[f"{blocks} blocks"] = Seen(y, judged=blocks < 16)
    return seen


PROBES: tuple[Callable[[Machine], dict[str, Seen]], ...] = (
    *(barriers, shuffles, widths, copies, ldmatrix, mma, conversions, atomics, launches, clusters),
)


# --- two machines


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the float32 values, neighbours one apart, -0 and 0 the same."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits + 2**31), bits)


def difference(expected: Seen, actual: Seen) -> tuple[str, bool]:
    """How the second differs from the first, or "", and whether that is a fault."""
    a, b = expected.values.contiguous(), actual.values.contiguous()
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}", True
    bits_a, bits_b = (t.view(INTEGER[t.dtype.itemsize]) for t in (a, b))
    other = bits_a != bits_b
    both_nan = a.isnan() & b.isnan()
    wrong = other & ~both_nan
    if expected.ulps:
        wrong &= ~(a.isfinite() & b.isfinite()) | ((ordered(a) - ordered(b)).abs() > expected.ulps)
    shown = wrong if wrong.any() else other & both_nan
    if not shown.any():
        return "", False
    i = shown.flatten().nonzero()[0].item()
    mask = (1 << 8 * a.dtype.itemsize) - 1
    left, right = (f"{t.flatten()[i].item():g} (0x{bits.flatten()[i].item() & mask:x})" for t, bits in ((a, bits_a), (b, bits_b)))
    what = f"{shown.sum().item()} of {a.numel()} differ{'' if wrong.any() else ' in the payload of a NaN'}"
    return f"{what}, first at {i}: simulator {left}, hardware {right}", bool(wrong.any()) and expected.judged


def compare(simulator: Machine, hardware: Machine) -> tuple[list[str], list[str]]:
    """Runs every probe on both. Faults, and what the two do differently where that is open."""
    faults, notes = [], []
    for probe in PROBES:
        seen = []
        for machine in (simulator, hardware):
            torch.manual_seed(0)
            try:
                seen.append(probe(machine))
            except RuntimeError as error:  # of this probe; a kernel that killed the context fails the next ones too
                faults.append(f"{probe.__name__}: {error}")
        if len(seen) < 2:
            continue
        for name, expected in seen[0].items():
            message, fault = difference(expected, seen[1][name])
            if message:
                (faults if fault else notes).append(f"{probe.__name__}: {name}: {message}")
    return faults, notes


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc") if home else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(arch: str) -> pathlib.Path:
    """probes.cu by nvcc, with what the CUDA library is compiled with."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (it comes with the CUDA toolkit)")
    target = build.ROOT / "build" / "gpu" / f"probes_{arch}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++20", f"-arch={arch}", "--expt-relaxed-constexpr", "-shared", "-cudart=static"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo", *(f"-I{folder}" for folder in (build.CSRC, build.CSRC / "cuda"))]
    command = [nvcc, *flags, "-o", str(target), str(build.HERE / "probes.cu")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
    return target


def arch_of_the_gpu() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def main() -> int:
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    simulator = Simulator(build.probes())
    hardware = Machine(ctypes.CDLL(str(compiled(arch_of_the_gpu()))), "cuda", limit)
    cluster = 16 if torch.cuda.get_device_capability() >= (9, 0) else 1
    with simulator.settings(shared_limit=limit, cluster=cluster):
        faults, notes = compare(Machine(simulator.library, "cpu", limit), hardware)
    for note in notes:
        print(f"open: {note}")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(PROBES)} probes, {len(faults)} faults, {len(notes)} differences where PTX leaves them open or NaN payloads")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
