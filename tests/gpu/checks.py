"""Checks of ops and models on a GPU, each a process: `python -m gpu.checks NAME`.

Those that need nothing of CUDA take another device and other backends, so that they can be tried without a GPU.
"""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

import fastconv
from fastconv import ops, use_backend
from fastconv.ops._registry import OPS
from fastconv.testing import CASES, Case, check_not_finite, check_op, dtypes_of, make_inputs, run

from . import RECORDED

BACKENDS = ("cuda", "triton")
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # of ConvNeXt-T at 224 x 224 pixels, as (H = W, C)
BATCH = 8
HUGE_BYTES = 60 << 30  # what the tensors of `huge` take, and room

Call = tuple[Callable, tuple]  # a function that raises where something does not hold, and its arguments


def attempt(call: Call) -> str:
    function, args = call
    try:
        function(*args)
    except Exception as error:  # a wrong result, a failed compilation or a launch error: each is one line, and the rest goes on
        return f"{' '.join(map(str, (function.__name__, *args)))}: {type(error).__name__}: {error}"
    return ""


def in_processes(calls: list[Call]) -> int:
    """Several, because Triton's kernels take long to compile and the float64 truth is the CPU's."""
    workers = min(12, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        errors = [error for error in pool.map(attempt, calls) if error]
    print(*errors, f"{len(calls) - len(errors)} of {len(calls)} calls right", sep="\n")
    return int(bool(errors))


def pairs(backends: tuple[str, ...]) -> list[tuple[str, str]]:
    """(op, backend) of all ops that have kernels of these backends."""
    return [(op, backend) for op in CASES for backend in backends if backend in OPS[op]]


def patchable(backend: str) -> list[str]:
    """What `patch` may fuse where this backend is forced."""
    return [op for op in ("depthwise_conv_norm", "global_response_norm", "gelu_linear", "residual_scale") if backend in OPS[op]]


def own_bits(backends: tuple[str, ...]) -> list[tuple[str, str]]:
    """Those whose results are our kernels' alone: in gelu_linear they are PyTorch's matrix products."""
    return [(op, backend) for op, backend in pairs(backends) if op != "gelu_linear"]


def contract_calls(device: str, backends: tuple[str, ...]) -> Iterator[Call]:
    """Every case of every op in every dtype, empty batches among them; then NaN and Inf in every tensor."""
    for op, backend in pairs(backends):
        yield from ((check_op, (c, d, backend, device)) for c in CASES[op] for d in dtypes_of(op, backend) if d in c.dtypes)
        for K, dtype in itertools.product((5, 7, 9) if op.startswith("depthwise_conv") else (7,), (torch.bfloat16, torch.float32)):
            if dtype not in dtypes_of(op, backend):
                continue
            case = Case(op, (2, 9, 11, 20), K=K)
            inputs = make_inputs(case, dtype)
            names = [name for name in (*inputs.tensors, "dout") if name not in inputs.constant]
            for name, value, border in itertools.product(names, (float("nan"), float("inf")), (False, True)):
                yield check_not_finite, (case, dtype, backend, name, value, border, device)


def contract(device: str = "cuda", backends: tuple[str, ...] = BACKENDS) -> int:
    return in_processes(list(contract_calls(device, backends)))


def real_case(op: str, batch: int, size: int, C: int) -> Case:
    """A call of a stage of ConvNeXt with C channels: the hidden layer of its blocks, after the GELU, has four times as many."""
    if op == "global_response_norm":
        return Case(op, (batch, size, size, 4 * C), act="gelu")
    if op == "grouped_conv":
        return Case(op, (batch, size, size, C), K=3, width=16)
    if op == "window_attention":
        return Case(op, (batch, size, size, C), heads=max(1, C // 32), window=(7, 7), shift=(3, 3), without=("logit_scale",))
    return Case(op, (batch, size, size, C))


def shapes(device: str = "cuda", backends: tuple[str, ...] = BACKENDS, batch: int = BATCH, stages=STAGES) -> int:
    """The op contract at the sizes of ConvNeXt-T."""
    cases = [(real_case(op, batch, size, C), backend) for size, C in stages for op, backend in pairs(backends)]
    return in_processes([(check_op, (case, dtype, backend, device)) for case, backend in cases for dtype in dtypes_of(case.op, backend)])


def real_calls(device: str, backends, batch: int = BATCH, stages=STAGES, dtypes=(torch.bfloat16,)):
    """Forward and backward of each op at the sizes of ConvNeXt-T: (label, inputs, call)."""
    for (op, backend), (size, C), dtype in itertools.product(own_bits(backends), stages, dtypes):
        if dtype not in dtypes_of(op, backend):
            continue
        inputs = make_inputs(real_case(op, batch, size, C), dtype, device)

        def call(op=op, inputs=inputs, backend=backend):
            with use_backend(backend):
                return run(getattr(ops, op), inputs)

        yield f"{backend} {op} {batch}x{size}x{size}x{C} {str(dtype).removeprefix('torch.')}", inputs, call


def unequal(a: dict, b: dict) -> list[str]:
    """Names of the tensors whose bits differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def told(label: str, wrong: list[str], right: str = "equal bits") -> bool:
    print(f"{label}: {'differs in ' + ', '.join(wrong) if wrong else right}")
    return not wrong


def repeat(device: str = "cuda", backends=BACKENDS, batch: int = BATCH, stages=STAGES, runs: int = 1000, seconds: float = 4) -> int:
    """Equal inputs give equal bits, 1,000 times, or as often as `seconds` allow."""
    ok = True
    for label, _, call in real_calls(device, backends, batch, stages, (torch.bfloat16, torch.float32)):
        first, end, done, wrong = call(), time.monotonic() + seconds, 0, []
        while not wrong and done < runs and time.monotonic() < end:
            wrong, done = unequal(first, call()), done + 1
        ok &= told(label, wrong, f"equal bits in {done} runs") and done > 0
    return int(not ok)


def stream() -> int:
    """On a side stream whose input is still being written: a kernel on another stream would read what was there before."""
    ok = True
    for label, inputs, call in real_calls("cuda", BACKENDS, stages=STAGES[:1]):
        expected = call()
        first = next(iter(inputs.tensors.values()))
        source = first.clone()
        side, busy = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda")
        first.fill_(7)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(20):
                busy @ busy
            first.copy_(source)
            actual = call()
        side.synchronize()
        ok &= told(label, unequal(expected, actual))
    return int(not ok)


def second_gpu() -> int:
    """Tensors of cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        print("one GPU: nothing was run on cuda:1")
        return RECORDED
    calls = [(check_op, (CASES[op][2], dtype, backend, "cuda:1")) for op, backend in pairs(BACKENDS) for dtype in dtypes_of(op, backend)]
    errors = [error for error in map(attempt, calls) if error]
    print(*errors, f"{len(calls) - len(errors)} of {len(calls)} calls right", sep="\n")
    return int(bool(errors))


def huge(device: str = "cuda", backends=BACKENDS, elements: int = 2**31) -> int:
    """More than 2^31 elements, all zero but for the first and the last image: these come out as one does alone, those between
    all alike, and the gradients of the parameters are twice those of one."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < HUGE_BYTES:
        print(f"less than {HUGE_BYTES >> 30} GiB of memory are free: nothing was run")
        return RECORDED
    ok = True
    for op, backend in own_bits(backends):
        without = () if op == "global_response_norm" else ("bias", "mask")
        one = make_inputs(Case(op, (1, 6, 9, 128), without=without), torch.bfloat16, device)
        images = elements // one.dout.numel() + 40
        shape = (images, *one.dout.shape[1:])

        def of_images(t, size=one.dout.shape[1:3]):
            return t.shape[1:3] == size  # height and width, or channels and height

        def grown(t, images=images, of_images=of_images):
            if t is None or not of_images(t):
                return t
            big = t.new_zeros((images, *t.shape[1:]))
            big[0] = big[-1] = t[0]
            return big

        many = one._replace(tensors={name: grown(t) for name, t in one.tensors.items()}, dout=grown(one.dout))
        with use_backend(backend):
            alone, got = run(getattr(ops, op), one), run(getattr(ops, op), many)
        wrong = []
        for name, expected in alone.items():
            actual = got[name]
            if not of_images(actual):
                if not (actual.double() - 2 * expected.double()).norm() <= 1e-2 * 2 * expected.double().norm():
                    wrong.append(name)
            elif not torch.equal(actual[0], expected[0]):
                wrong.append(f"{name} of the first image")
            elif not torch.equal(actual[-1], expected[0]):
                wrong.append(f"{name} of the last image")
            elif actual[1:-1].ne(actual[1]).any():
                wrong.append(f"{name} of an image between")
        ok &= told(f"{backend} {op} {'x'.join(map(str, shape))}", wrong, "as one image alone")
    return int(not ok)


# --- models


def random_model(name: str) -> torch.nn.Module:
    """Scales as after training: with a fresh layer scale of 1e-6 no error of a block would show."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim == 1 and not n.endswith("bias"):
                p.uniform_(0.3, 0.7)
    return model


def results(model: torch.nn.Module, x: torch.Tensor, direction: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of their sum along a direction, under autocast where dtype is narrow."""
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        logits = model(x)
    names, parameters = zip(*model.named_parameters())
    return {"logits": logits.detach(), **dict(zip(names, torch.autograd.grad((logits.to(direction.dtype) * direction).sum(), parameters)))}


def parity(device: str = "cuda", backends=BACKENDS, models=("convnext_atto", "convnext_tiny"), size: int = 96) -> int:
    """A patched timm model against itself unpatched, by the tolerance rule for whole models: float64 is the truth."""
    torch.backends.cudnn.allow_tf32 = False
    ok = True
    for name in models:
        model = random_model(name)
        x, direction = torch.randn(4, 3, size, size), torch.randn(4, 10)
        truth = results(copy.deepcopy(model).double(), x.double(), direction.double(), torch.float64)
        model, x, direction = model.to(device), x.to(device), direction.to(device)
        for dtype in (torch.float32, torch.bfloat16):
            plain = results(model, x, direction, dtype)
            for backend in backends:
                patched = copy.deepcopy(model)
                fused, blocks = fastconv.patch(patched, ops=patchable(backend), strict=True).blocks
                with use_backend(backend):
                    actual = results(patched, x, direction, dtype)
                ran = {site.backend for site in fastconv.report(patched).fused}
                wrong = [] if fused == blocks > 0 and ran == {backend} else [f"what ran ({fused} of {blocks} blocks, on {ran})"]
                for what, exact in truth.items():
                    factor, atol = (2, 1e-5) if what == "logits" else (3, 1e-4)
                    error, own = ((t[what].cpu().double() - exact).norm() / exact.norm() for t in (actual, plain))
                    if not error <= factor * own + (atol if dtype == torch.float32 else 8e-3):
                        wrong.append(f"{what} (relative error {error:.2e}, unpatched {own:.2e})")
                ok &= told(f"{name} {dtype} on {backend}", wrong, f"{blocks} blocks fused, as exact as unpatched")
    return int(not ok)


# --- CUDA graphs


def replays(label: str, call: Callable[[], dict], inputs: list[torch.Tensor], tolerance: float = 0) -> bool:
    """Captured on a side stream, then replayed on new numbers on the current stream and on another: equal to a run without."""
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets libraries allocate what they keep
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = call()
    with torch.no_grad():
        for t in inputs:
            t.mul_(-0.5)
    expected = call()
    wrong = []
    for where, on in (("current stream", torch.cuda.current_stream()), ("side stream", other)):
        for t in result.values():
            if all(t.data_ptr() != given.data_ptr() for given in inputs):  # the gradient of a sum is the one that came in
                t.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(on):
            graph.replay()
        torch.cuda.synchronize()
        for name, t in expected.items():
            if not (torch.equal(result[name], t) or (result[name] - t).float().norm() <= tolerance * t.float().norm()):
                wrong.append(f"{name} ({where})")
    return told(label, wrong, "replayed as run")


def graph() -> int:
    """Forward and backward of each op, and of a patched block, as CUDA graphs."""
    ok = True
    for label, inputs, call in real_calls("cuda", BACKENDS, dtypes=(torch.bfloat16, torch.float32)):
        ok &= replays(label, call, [next(iter(inputs.tensors.values())), inputs.dout])
    for backend, dtype in itertools.product(BACKENDS, (torch.bfloat16, torch.float32)):
        model = random_model("convnext_tiny").to("cuda", dtype, memory_format=torch.channels_last)
        fastconv.patch(model, ops=patchable(backend), strict=True)
        block = model.stages[0].blocks[0]
        x, direction = (torch.randn(BATCH, 96, 56, 56, device="cuda", dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
        names, leaves = zip(("x", x.requires_grad_()), *block.named_parameters())

        def call(block=block, x=x, direction=direction, names=names, leaves=leaves, backend=backend):
            with use_backend(backend):
                out = block(x)
                return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, leaves, direction)))}

        # Matrix products may be summed in another order where the library sees a capture.
        ok &= replays(f"{backend} block {dtype}", call, [x, direction], 1e-2 if dtype == torch.bfloat16 else 1e-5)
        assert {site.backend for site in fastconv.report(block).fused} == {backend}
    return int(not ok)


CHECKS = {f.__name__: f for f in (contract, shapes, repeat, stream, second_gpu, huge, parity, graph)}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        print(f"usage: python -m gpu.checks {'|'.join(CHECKS)}", file=sys.stderr)
        return 2
    return CHECKS[sys.argv[1]]()


if __name__ == "__main__":
    sys.exit(main())
