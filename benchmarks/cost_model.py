"""What the tensor cores' depthwise convolution should take at the stages of ConvNeXt-T on an H200: a prediction, not measured.

    python benchmarks/cost_model.py

bfloat16, 7 x 7 taps. From what the simulator counts an output (COUNTERS, held to it by tests/test_simt_mma.py), from the
warp instructions of the loops in the machine code for sm_90 (read off by hand), and from the chip's rates. A time is a range:
the slowest of four resources, as if the blocks of an SM overlapped all of them, and the sum of memory and the slowest other
one, as if a block's phases never overlapped another's.
"""

from __future__ import annotations

from typing import NamedTuple

STAGES = {1: (56, 96), 2: (28, 192), 3: (14, 384), 4: (7, 768)}  # H = W, C

# The chip: SMs, clock (Hz), copy bandwidth (bytes/s), products of mma.sync a clock and SM (62% of the dense rate, recalled and
# not measured), passes through shared memory and issue slots a clock and SM.
SMS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.3e12
MMA, SHARED, ISSUE, FFMA = 0.62 * 2048, 1, 4, 128


class Counters(NamedTuple):
    """Of one pass, an output: what `counts` of the test measures, where a block has as many tiles as at batch 128."""

    activations: float  # distinct, read or written: 2 bytes each
    rest: float  # partial sums and parameters, in activations
    fma: float  # of mma
    passes: float  # through shared memory
    outputs: int  # of a tile and channel, on the map
    rows: int  # that a thread stages of a tile, in whole batches of two


COUNTERS = {
    ("forward", 1): Counters(2, 0.008, 112.0, 0.159, 896, 8),
    ("forward", 2): Counters(2, 0.016, 128.0, 0.172, 784, 8),
    ("forward", 3): Counters(2, 0.016, 128.0, 0.179, 784, 8),
    ("forward", 4): Counters(2, 0.016, 128.0, 0.209, 784, 14),
    ("backward", 1): Counters(3, 0.175, 240.0, 0.281, 896, 8),
    ("backward", 2): Counters(3, 0.287, 274.3, 0.318, 784, 8),
    ("backward", 3): Counters(3, 0.287, 274.3, 0.324, 784, 8),
    ("backward", 4): Counters(3, 0.287, 274.3, 0.355, 784, 14),
}


class Instructions(NamedTuple):
    """Of a warp in machine code: to a tile, a staged row, a moved strip (two of x, two of outputs), a channel; to a block."""

    tile: int
    row: int
    strip: int
    strips: int
    channel: int
    block: int


INSTRUCTIONS = {"forward": Instructions(200, 84, 191, 2, 175, 460), "backward": Instructions(200, 84, 188, 4, 372, 900)}
CHANNELS, WARPS, OWN = 16, 8, 2  # of a block; channels of a warp
TILES = {("forward", 1): 2.6, ("forward", 2): 1.5}  # to a block at batch 128, else 1


class Prediction(NamedTuple):
    """Seconds that each resource is busy."""

    memory: float
    tensor: float
    shared: float
    issue: float

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def serial(self) -> float:
        return self.memory + max(self[1:])


def predict(kind: str, stage: int, batch: int = 128) -> Prediction:
    size, C = STAGES[stage]
    outputs = batch * size * size * C
    c, i = COUNTERS[kind, stage], INSTRUCTIONS[kind]
    tile = i.tile + c.rows * i.row + i.strips * i.strip + OWN * i.channel + i.block / TILES.get((kind, stage), 1)
    issue = tile * WARPS / (CHANNELS * c.outputs)
    per_second = SMS * CLOCK
    return Prediction(
        2 * outputs * (c.activations + c.rest) / BANDWIDTH,
        outputs * c.fma / (MMA * per_second),
        outputs * c.passes / (SHARED * per_second),
        outputs * issue / (ISSUE * per_second),
    )


# Forward with the norm (depthwise_conv_norm), saving z for backward. In one launch a block goes through its tile in steps of 16
# channels, for each of which it stages the tile and the filters anew; apart, the norm reads z again and writes y. Counters of one
# launch at the batch of tests/test_simt_norm_mma.py; warp instructions of a step (staging, filters, mma and addresses, z), and of the norm
# of a lane's 32 channels.
JOINED = {1: Counters(3, 0.046, 120.0, 0.406, 358, 4), 2: Counters(3, 0.037, 164.6, 0.531, 261, 4)}
STEP, NORM = 85 * 4 + 115 + 600 + 2 * 101, 650
NORM_LANES = {1: 4, 2: 8}  # of 32 channels, to a pixel


def predict_norm(stage: int, joined: bool, batch: int = 128) -> list[Prediction]:
    """Of each launch."""
    size, C = STAGES[stage]
    outputs, per_second = batch * size * size * C, SMS * CLOCK
    norm = NORM * NORM_LANES[stage] / (32 * C)  # warp instructions an output
    if not joined:
        return [predict("forward", stage, batch), Prediction(4 * outputs / BANDWIDTH, 0, 0, outputs * norm / (ISSUE * per_second))]
    c = JOINED[stage]
    issue = STEP * WARPS / (CHANNELS * c.outputs) + norm
    return [
        Prediction(
            2 * outputs * (c.activations + c.rest) / BANDWIDTH,
            outputs * c.fma / (MMA * per_second),
            outputs * c.passes / (SHARED * per_second),
            outputs * issue / (ISSUE * per_second),
        )
    ]


def norm_table(batch: int = 128) -> str:
    lines = ["| microseconds | memory | tensor cores | shared memory | issue | predicted |", "|---|---|---|---|---|---|"]
    for stage in JOINED:
        for joined in (True, False):
            launches = predict_norm(stage, joined, batch)
            cells = " | ".join(f"{1e6 * sum(values):.0f}" for values in zip(*launches))
            low, high = (sum(getattr(p, way) for p in launches) for way in ("overlapped", "serial"))
            form = "one launch" if joined else "apart"
            lines.append(f"| stage {stage} with the norm, {form} | {cells} | {1e6 * low:.0f} to {1e6 * high:.0f} |")
    return "\n".join(lines)


def table(batch: int = 128) -> str:
    lines = [
        "| microseconds | floor | memory | tensor cores | shared memory | issue | predicted | 49 FFMA an output |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, stage in COUNTERS:
        size, C = STAGES[stage]
        p, outputs = predict(kind, stage, batch), batch * size * size * C
        floor = 2 * outputs * COUNTERS[kind, stage].activations / BANDWIDTH
        plain = outputs * 49 * (1 if kind == "forward" else 2) / (SMS * CLOCK * FFMA)
        values = (floor, p.memory, p.tensor, p.shared, p.issue)
        cells = " | ".join(f"{1e6 * v:.0f}" for v in values)
        name = f"stage {stage} {kind}"
        lines.append(f"| {name} | {cells} | {1e6 * p.overlapped:.0f} to {1e6 * p.serial:.0f} | {1e6 * plain:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("Predicted for an H200, batch 128, bfloat16; not measured.\n")
    print(table())
    print()
    print(norm_table())
