"""Measures where grouped_conv's CPU kernels beat torch's convolutions, for the table in fastconv/ops/_grouped.py.

    OMP_NUM_THREADS=1 python benchmarks/tune_grouped_conv.py float32

Prints, for each layout and stride, the least output side from which on each pass is at least a tenth faster, by channels a group.
3x3 kernels, 8 images, interleaved, the least of the rounds in the thread's processor time. For another instruction set set
ONEDNN_MAX_CPU_ISA=AVX2, ATEN_CPU_CAPABILITY=avx2 and FASTCONV_CPU_CAPABILITY=avx2 together.
"""

import argparse
import time

import torch

from fastconv.ops._registry import raw

WIDTHS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56)
CHANNELS = {56: 96, 28: 192, 14: 384, 7: 768}  # by output side: as networks have them
WANTED = 1.1
PASSES = ("fwd", "dx", "dweight")


def calls(x, weight, stride: int, groups: int, nhwc: bool) -> dict[str, tuple]:
    """(torch's, ours) of each pass."""
    settings = [stride, stride], [1, 1], [1, 1]
    y = torch.nn.functional.conv2d(x, weight, None, *settings, groups)
    dy = torch.randn_like(y)
    maps = [t.permute(0, 2, 3, 1) if nhwc else t for t in (dy, x)]
    geometry = stride, stride, 1, 1, groups, nhwc
    fwd, bwd = (raw(f"grouped_conv_{way}", "cpu") for way in ("fwd", "bwd"))

    def theirs(*mask):
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, False, [0, 0], groups, [*mask, False])

    return {
        "fwd": (
            lambda: torch.nn.functional.conv2d(x, weight, None, *settings, groups),
            lambda: fwd(maps[1], weight, None, *geometry, x.dtype),
        ),
        "dx": (lambda: theirs(True, False), lambda: bwd(*maps, weight, *geometry, True, False)),
        "dweight": (lambda: theirs(False, True), lambda: bwd(*maps, weight, *geometry, False, True)),
    }


def ratios(width: int, side: int, stride: int, nhwc: bool, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    groups = max(2, CHANNELS[side] // width)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.randn(8, groups * width, side * stride, side * stride).to(dtype).to(memory_format=layout)
    weight = torch.randn(groups * width, width, 3, 3).to(dtype)
    functions = {(name, i): f for name, pair in calls(x, weight, stride, groups, nhwc).items() for i, f in enumerate(pair)}
    times: dict[tuple, list[float]] = {key: [] for key in functions}
    for _ in range(1 + rounds):
        for key, function in functions.items():
            start = time.thread_time()
            function()
            times[key].append(time.thread_time() - start)
    best = {key: min(taken[1:]) for key, taken in times.items()}
    return {name: best[name, 0] / best[name, 1] for name in PASSES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=sorted(CHANNELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"# torch {torch.__version__}, {torch.ops.fastconv.cpu_capability()}")
    for nhwc in (False, True):
        for stride in (1, 2):
            least: dict[str, dict[int, int]] = {name: {} for name in PASSES}
            for width in WIDTHS:
                lost = set()
                for side in sorted(args.sides, reverse=True):
                    for name, ratio in ratios(width, side, stride, nhwc, dtype, args.rounds).items():
                        if ratio < WANTED:
                            lost.add(name)
                        elif name not in lost:
                            least[name][width] = side
            print(f"    ({capability!r}, torch.{args.dtype}, {nhwc}, {stride}): ({', '.join(map(str, least.values()))}),", flush=True)


if __name__ == "__main__":
    main()
