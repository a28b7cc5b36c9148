"""window_attention on tensor cores in the simulator: windows up to 24 x 24, its plan, choice, traffic and seeded bugs.

What every op must do is held in test_simt_ops.py, for the cases of the op.
"""

import copy
import itertools
import types

import fastconv._C as native
import numpy as np
import pytest
import torch
from simt import build
from simt.build import Bug
from simt.control import ORDERS, SHARED_LIMIT
from simt.hub import NAMESPACE, load, simulated
from test_simt_faults import CONTRACT, SANITIZER, Fault, check, says
from test_simt_ops import on_simulator, same_bits

import fastconv
from fastconv import ops, use_backend
from fastconv.models.swin import SwinTransformer
from fastconv.ops import _registry, _window
from fastconv.testing import Case, RawCalls, assert_matches, check_not_finite, check_op, make_inputs, poisoned, run, truth_of

OP = "window_attention"
HALVES = (torch.bfloat16, torch.float16)
V1, WHOLE = ("logit_scale",), ("pad_bias",)
# Settings of the simulator: bytes of shared memory that hold a few rows of patches at a time.
TIGHT = 70 << 10

CALLS = (
    (Case(OP, (2, 13, 20, 72), heads=3, window=(12, 10), shift=(6, 5), order="pad_roll"), {}),
    (Case(OP, (1, 12, 14, 32), heads=1, window=(12, 14), shift=(0, 3), without=V1), {"shared_limit": 60 << 10}),
    (Case(OP, (1, 17, 12, 96), heads=1, window=(16, 12), shift=(8, 3)), {"shared_limit": 90 << 10}),
    (Case(OP, (1, 24, 24, 32), heads=1, window=(24, 24), shift=(12, 12), without=V1), {}),
    (Case(OP, (1, 24, 20, 64), heads=1, window=(24, 20), shift=(12, 7)), {}),
    (Case(OP, (1, 24, 24, 128), heads=1, window=(24, 24), shift=(0, 0), without=WHOLE), {}),
    (Case(OP, (1, 30, 23, 16), heads=1, window=(23, 22), shift=(11, 0), without=("bias_table",)), {"shared_limit": TIGHT}),
    (Case(OP, (2, 22, 5, 34), heads=2, window=(21, 2), shift=(3, 1)), {}),
    (Case(OP, (1, 3, 25, 48), heads=2, window=(1, 24), shift=(0, 9), order="pad_roll"), {}),
)
QUICK = (1, 3, 7, 8)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.mark.parametrize(
    ("i", "order"),
    [
        pytest.param(i, order, marks=() if i in QUICK and order == ORDERS[i % 3] else pytest.mark.slow)
        for i in range(len(CALLS))
        for order in ORDERS
    ],
)
@pytest.mark.timeout(600)
def test_large_windows(i, order):
    case, settings = CALLS[i]
    with simulated() as simulator, simulator.settings(order=order, **settings):
        check_op(case, HALVES[i % 2], "cuda")


def test_bits_do_not_depend_on_the_order():
    """Several windows to a block, several passes of the warps, cosine attention, padded tokens."""
    inputs = make_inputs(Case(OP, (7, 13, 25, 1056), heads=132, window=(12, 12), shift=(6, 5)), torch.bfloat16)
    whole = inputs.tensors  # of which the first head is taken, with the blocks of many
    few = {"qkv": whole["qkv"][:, :, :, :, :1], "bias_table": whole["bias_table"][:, :1], "logit_scale": whole["logit_scale"][:1]}
    given = inputs._replace(tensors={**few, "pad_bias": whole["pad_bias"][:, :1]}, dout=inputs.dout[..., :8].contiguous())
    first = on_simulator(OP, given)
    for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
        same_bits(on_simulator(OP, given, **settings), first)


def test_separate_tensors_and_views_far_apart():
    """q, k and v of images that lie more than 2^31 elements apart give the bits of packed ones."""
    case = Case(OP, (2, 5, 7, 24), heads=2, window=(3, 4), shift=(1, 2))
    inputs = make_inputs(case, torch.bfloat16)
    packed = on_simulator(OP, inputs)
    apart, size = 2**31 + 64, 5 * 7 * 24
    memory = torch.from_numpy(np.zeros(apart + size, np.int16)).view(torch.bfloat16)  # takes no memory where it stays zero
    others = {name: t for name, t in inputs.tensors.items() if name != "qkv"}
    parts = [t.contiguous() for t in inputs.tensors["qkv"].unbind(3)]
    for i in range(3):
        far = memory.as_strided((2, 5, 7, 2, 12), (apart, 7 * 24, 24, 12, 1)).copy_(parts[i])
        leaves = [(far if i == j else part).detach().requires_grad_() for j, part in enumerate(parts)]
        with simulated(), use_backend("cuda"), poisoned():
            y = ops.window_attention(tuple(leaves), **others, **inputs.options)
            grads = torch.autograd.grad(y, leaves, inputs.dout)
        assert torch.equal(y, packed["out"]) and torch.equal(torch.stack(grads, 3), packed["dqkv"])


def test_a_logit_overcomes_the_mask():
    """Cosine logits near +-100 beside a mask of -100: added, not infinite."""
    case = Case(OP, (1, 12, 12, 32), heads=1, window=(12, 12), shift=(6, 6), scale=10.0, without=WHOLE)
    inputs = make_inputs(case, torch.bfloat16)
    truth, eager = truth_of(OP, inputs), run(_registry.hub(OP).reference, inputs)
    got = on_simulator(OP, inputs)
    for name in truth:
        assert_matches(got[name], eager[name], truth[name], grad=name != "out", dtype=torch.bfloat16, name=name)
    masked = run(_registry.hub(OP).reference, inputs._replace(options={**inputs.options, "mask_value": -1e9}), ())["out"]
    assert (got["out"] - masked).abs().max() > 0.1, "the mask alone would decide"


@pytest.mark.parametrize(
    ("name", "value", "border"),
    [
        pytest.param(name, value, border, marks=() if (i % 5) == 0 else pytest.mark.slow)
        for i, (name, value, border) in enumerate(
            itertools.product(("qkv", "bias_table", "logit_scale", "pad_bias", "dout"), (float("nan"), float("inf")), (False, True))
        )
    ],
)
def test_not_finite(name, value, border):
    """One Inf or NaN reaches what the formula says, and nothing else."""
    case = Case(OP, (2, 5, 7, 24), heads=2, window=(4, 3), shift=(1, 2))
    with simulated():
        check_not_finite(case, torch.bfloat16, "cuda", name, value, border)


def test_a_patched_swin_runs_on_the_kernels():
    """In bfloat16, shifted and not, with a map that the windows do not fill: every pass is theirs, and the model agrees."""
    torch.manual_seed(0)
    plain = SwinTransformer(embed_dim=32, depths=(2,), num_heads=(2,), window_size=12, img_size=64, num_classes=5).bfloat16()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "table" in name:
                p.normal_()
    model = copy.deepcopy(plain)
    fastconv.patch(model, ops=OP)
    x = torch.randn(1, 3, 64, 60).bfloat16()

    def step(m, x):
        logits = m(x)
        gradients = torch.autograd.grad(logits.square().sum(), list(m.parameters()))
        return {"logits": logits.detach(), **dict(zip((name for name, _ in m.named_parameters()), gradients))}

    truth, own = step(copy.deepcopy(plain).double(), x.double()), step(plain, x)
    with simulated(), use_backend("cuda"), RawCalls() as recorded:
        got = step(model, x)
    called = [func.__name__.split(".")[0] for func, *_ in recorded.calls if func.namespace == NAMESPACE]
    assert sorted(called) == [f"{OP}_bwd"] * 2 + [f"{OP}_fwd"] * 2
    for name, exact in truth.items():
        error, eager = ((t[name].double() - exact).norm() / exact.norm() for t in (got, own))
        assert error <= (2 if name == "logits" else 3) * eager + 8e-3, (name, error, eager)


# --- plan and choice


def test_plans_fit():
    """Every window up to 24 x 24 and head_dim up to 128 fits an sm_80; where blocks have 99 KiB, all but the largest of both."""
    for shared, least in ((SHARED_LIMIT, 129), (227 << 10, 129), (99 << 10, 65)):
        heights, widths, head_dims = (1, 2, 5, 12, 16, 21, 24), (1, 4, 7, 12, 13, 24), (1, 16, 32, 33, 64, 96, 128)
        for wh, ww, D, backward in itertools.product(heights, widths, head_dims, (False, True)):
            warps, rows, _, size = native.cuda_window_plan(wh, ww, D, backward, shared)
            assert 0 <= warps <= 8 and size <= shared - 128
            assert (warps > 0) == (rows > 0) and (warps > 0 or least <= D), (wh, ww, D, backward, shared)
            assert warps * rows == 0 or rows <= -(-wh // 4)
    assert native.cuda_window_plan(25, 8, 32, False, SHARED_LIMIT)[0] == native.cuda_window_plan(8, 8, 129, True, SHARED_LIMIT)[0] == 0


TOO_MANY = "triton: windows of 256 tokens at most, got {}".format
TOO_SMALL = "the shared memory of a block of this GPU is too small for windows of (24, 24) and a head_dim of 128"


@pytest.mark.parametrize(
    ("window", "head_dim", "dtype", "expected"),
    (
        ((7, 7), 32, torch.bfloat16, ("triton", "")),
        ((8, 8), 32, torch.float16, ("triton", "")),
        ((11, 11), 32, torch.float16, ("triton", "")),
        ((12, 12), 32, torch.bfloat16, ("cuda", "")),
        ((24, 24), 32, torch.float16, ("cuda", "")),
        ((2, 128), 32, torch.float16, ("triton", "")),
        ((16, 16), 32, torch.float32, ("triton", "")),
        ((24, 24), 32, torch.float32, ("eager", "cuda: tensor cores take bfloat16 and float16, got float32; " + TOO_MANY((24, 24)))),
        ((25, 12), 32, torch.float16, ("eager", "cuda: windows of 24 x 24 tokens at most, got (25, 12); " + TOO_MANY((25, 12)))),
        ((7, 7), 136, torch.float16, ("eager", "triton: a head_dim of 128 at most, got 136; cuda: a head_dim of 128 at most, got 136")),
        ((24, 24), 128, torch.float16, ("eager", f"cuda: {TOO_SMALL}; " + TOO_MANY((24, 24)))),
    ),
    ids=str,
)
def test_the_choice_of_a_gpu(window, head_dim, dtype, expected, monkeypatch):
    """By the window: Triton first for what it holds whole, tensor cores from 144 tokens on. A block here has 99 KiB."""
    monkeypatch.setattr(_registry, "missing", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(shared_memory_per_block_optin=99 << 10))
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert _window.choose(x, (), window, head_dim, dtype) == expected
    for forced in ("cuda", "triton"):
        monkeypatch.setitem(_registry._state, "forced", forced)
        if forced == expected[0] or (forced == "triton" and window[0] * window[1] <= 256 >= head_dim * 2):
            assert _window.choose(x, (), window, head_dim, dtype).backend == forced
        elif expected[0] == "eager":
            with pytest.raises(RuntimeError, match=f"'{forced}' was asked for and cannot run"):
                _window.choose(x, (), window, head_dim, dtype)
    monkeypatch.setitem(_registry._state, "forced", None)
    monkeypatch.setattr(_registry, "missing", lambda op, backend, *_: "not built" if backend == "cuda" else "")
    got = _window.choose(x, (), window, head_dim, dtype)
    assert got.backend == ("triton" if window[0] * window[1] <= 256 and head_dim <= 128 else "eager")
    assert got.backend == "triton" or "cuda: not built" in got.reason


def test_float32_is_refused():
    inputs = make_inputs(Case(OP, (1, 3, 4, 8), window=(2, 2), shift=(0, 0)), torch.float32)
    with pytest.raises(RuntimeError, match="'cuda' was asked for and cannot run: tensor cores take bfloat16 and float16, got float32"):
        on_simulator(OP, inputs)


# --- counters

STAGES = {12: Case(OP, (1, 24, 24, 64), heads=2, window=(12, 12), shift=(6, 6), without=(*V1, *WHOLE))}
STAGES[16] = Case(OP, (1, 32, 16, 64), heads=2, window=(16, 16), shift=(8, 8), without=WHOLE)
STAGES[24] = Case(OP, (1, 24, 24, 32), heads=1, window=(24, 24), shift=(0, 0), without=WHOLE)
# Bytes a token and channel asked of the caches: forward q once, k, v once, y; backward each of q, k, v and dy once by the warp that owns
# a patch of it and once for all, and the three gradients. From memory each input once: 8 and 14.
ASKED = {"fwd": {12: 8, 16: 8, 24: 8}, "bwd": {12: 22, 16: 22, 24: 22}}


@pytest.mark.parametrize("window", [12, *(pytest.param(w, marks=pytest.mark.slow) for w in (16, 24))])
def test_counters(window):
    case = STAGES[window]
    inputs = make_inputs(case, torch.bfloat16)
    load().counted()
    with RawCalls() as recorded:
        on_simulator(OP, inputs, count=True, shared_limit=227 << 10)
    launches = load().counted()
    N, pairs = window * window, inputs.dout.numel() * window * window
    for name, launch, (_, args, results), floor, products in zip(("fwd", "bwd"), launches, recorded.calls, (8, 14), (2, 9)):
        maps = [t for t in (*args, *results) if isinstance(t, torch.Tensor) and t.numel() >= inputs.dout.numel()]
        distinct = total = 0
        for counted in launch.sectors.values():
            inside = np.zeros(len(counted), bool)
            for t in maps:
                last = t.data_ptr() + 2 * sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
                inside |= (counted[:, 0] >= t.data_ptr() // 32) & (counted[:, 0] <= last // 32)
            distinct, total = distinct + 32 * inside.sum(), total + 32 * int(counted[inside, 1].sum())
        distinct, total = (n / inputs.dout.numel() for n in (distinct, total))
        fma = launch.mma_fma / pairs
        wavefronts = launch.sum("wavefronts", space="shared") / (pairs / case.C * case.heads) * 128
        ideal = launch.sum("ideal", space="shared") / (pairs / case.C * case.heads) * 128
        print(
            f"{N} tokens {name}: {distinct:.2f} bytes a token and channel of {floor}, {total:.2f} asked for, {fma:.2f} products, "
            f"{wavefronts:.1f} wavefronts for 128 pairs ({ideal:.1f} ideal), {launch.shared_bytes} bytes, {launch.threads} threads"
        )
        assert 0.999 * floor <= distinct <= 1.01 * floor, (name, distinct)
        assert total <= 1.01 * ASKED[name][window], (name, total)
        assert products - 1e-6 <= fma <= 1.01 * products, (name, fma)
        assert wavefronts <= 1.3 * ideal, (name, wavefronts, ideal)


# --- seeded bugs

FORWARD, BACKWARD, PIECES = (f"cuda/window_attention{end}" for end in ("_kernel.cu", "_bwd_kernel.cu", ".cuh"))
TWELVE, SIXTEEN = f"{OP}:13:bfloat16", f"{OP}:12:float16"  # windows of 12 x 12 with padding; of 16 x 16, cosine attention
BUGS = {
    "an even number of steps": (Bug(BACKWARD, "const int steps = across | 1;", "const int steps = across;"), SIXTEEN, "data race"),
    "sums of the band kept": (Bug(BACKWARD, "            clear(sh.band, band_floats);\n", ""), TWELVE, "dbias_table|not finite"),
    "maximum not carried": (Bug(FORWARD, "most[i] = top[i], sum[i] *= keep;", "most[i] = top[i];"), TWELVE, "out: "),
    "a token's column for its row": (Bug(PIECES, "n % kTokens / 4, column", "n % 4, column"), TWELVE, "out: "),
    "padded tokens lost": (Bug(BACKWARD, "before[0] + sum[0]", "sum[0]"), SIXTEEN, "dpad_bias"),
    "norm a constant": (Bug(BACKWARD, "inverse[0] < 1e12f ? along[0] : 0", "0"), SIXTEEN, "dqkv"),
    "keys not there yet": (Bug(FORWARD, "if (stage) sync_threads();", "if (stage) sync_warp();"), TWELVE, "data race"),
    "one partial for all slices": (Bug(BACKWARD, "slice * p.partial_floats;", "0;"), TWELVE, "dbias_table|not finite"),
}
FAST = ("maximum not carried", "one partial for all slices")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BUGS])
def test_a_seeded_bug_is_caught(name):
    bug, item, message = BUGS[name]
    variant, code = ("tsan", SANITIZER) if message == "data race" else ("plain", CONTRACT)
    says(check(build.ops(variant, (bug,)), variant, "forward", item), Fault("", bug, item, message, (code,), variant))
