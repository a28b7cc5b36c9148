"""The CUDA kernels on the CPU: the op contract in three thread orders, through the hubs, and under the sanitizers.

What the simulator sees and what it does not: tests/simt/__init__.py.
"""

import math
import subprocess
import sys

import pytest
import torch
from simt import build
from simt.control import ORDERS
from simt.hub import NAMESPACE, load, simulated

import fastconv
from fastconv import ops, use_backend
from fastconv.models.convnext import ConvNeXt
from fastconv.ops._registry import OPS as ALL_OPS
from fastconv.ops._registry import hub, select
from fastconv.testing import CASES, Case, RawCalls, check_op, dtypes_of, make_inputs, poisoned, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = sorted(op for op, backends in ALL_OPS.items() if "cuda" in backends)
every_op = pytest.mark.parametrize("op", OPS)
every_op_and_dtype = pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op in OPS for dtype in dtypes_of(op, "cuda")], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(op: str, *shape: int, **options) -> Case:
    served = {"K": 3, "width": 4} if op == "grouped_conv" else {}  # by its CUDA kernels, and in 16 bits
    return Case(op, shape or (2, 9, 15, 40), **{**served, **options})


def on_simulator(op, inputs, wanted=None, **settings):
    with simulated() as simulator, simulator.settings(**settings), use_backend("cuda"), poisoned():
        return run(getattr(ops, op), inputs, wanted)


def same_bits(left: dict, right: dict) -> None:
    for name in left.keys() & right.keys():
        assert torch.equal(left[name], right[name]), name


# --- the contract


@every_order
@pytest.mark.parametrize("case", [c for op in OPS for c in CASES[op]], ids=lambda case: f"{case.op}-{case}")
def test_values_and_gradients(case, order):
    with simulated() as simulator, simulator.settings(order=order):
        for dtype in dtypes_of(case.op, "cuda"):
            if dtype in case.dtypes:
                check_op(case, dtype, "cuda")


@every_op_and_dtype
def test_same_bits_in_every_order(op, dtype):
    """Sums are ordered by the shape alone: not by threads, nor by which blocks run first."""
    inputs = make_inputs(small(op, 3, 17, 9, 72), dtype)
    first = on_simulator(op, inputs)
    for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
        same_bits(on_simulator(op, inputs, **settings), first)


@every_dtype
@pytest.mark.parametrize("case", (small("depthwise_conv_norm", 2, 15, 16, 96), small("depthwise_conv_norm", 3, 9, 7, 264, K=3)), ids=str)
def test_one_launch_and_two_have_the_same_bits(case, dtype):
    """The norm in the convolution's launch, and apart where x starts on no 16 bytes: z is rounded before it in both."""
    names = ((), ("x",), ("weight", "norm"), ("out",), ("x", "weight", "norm", "out"))
    if dtype != torch.float32:
        case = case._replace(K=3)  # apart, 5x5 and 7x7 taps run on tensor cores, which add in another order
    for wide in names if dtype != torch.float32 else names[:1]:
        inputs = make_inputs(case._replace(wide=wide), dtype)
        x = inputs.tensors["x"]
        moved = inputs._replace(tensors={**inputs.tensors, "x": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)})
        forms = []
        for given, launches in ((inputs, 1), (moved, 2)):
            load().counted()
            with RawCalls() as recorded:
                y = on_simulator(case.op, given, (), count=True)["out"]
            assert len(load().counted()) == launches
            with RawCalls() as recorded:
                on_simulator(case.op, given)
            forms.append((y, *recorded.calls[0][2]))
        assert all(left.numel() and torch.equal(left, right) for left, right in zip(*forms, strict=True)), wide


@every_op
def test_any_one_gradient(op):
    """Frozen parameters: each gradient alone, and none; shapes, strides and dtypes are those of the fake kernels."""
    inputs = make_inputs(small(op, K=3), torch.bfloat16)
    full = on_simulator(op, inputs)
    for name in full:
        wanted = () if name == "out" else (name[1:],)
        with simulated(), RawCalls() as recorded:
            some = on_simulator(op, inputs, wanted)
        same_bits(some, full)
        assert some.keys() == {"out", *(f"d{w}" for w in wanted)}
        for func, args, results in recorded.calls:
            assert func.namespace == NAMESPACE
            with torch._subclasses.FakeTensorMode() as mode:
                fakes = torch.utils._pytree.tree_leaves(func(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)))
            assert [(f.shape, f.stride(), f.dtype) for f in fakes] == [(r.shape, r.stride(), r.dtype) for r in results]


@every_op
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # opcheck backpropagates through raw ops
def test_opcheck(op):
    seen = set()
    for case in (small(op, 1, 2, 3, 8, K=3), small(op, 0, 4, 3, 6)):
        inputs = make_inputs(case, torch.bfloat16)
        with simulated(), RawCalls() as recorded:
            on_simulator(op, inputs)
        for func, args, _ in recorded.calls:
            torch.library.opcheck(func, args)
            seen.add(func.__name__.split(".")[0])
    assert seen == set(hub(op).SCHEMAS)


@every_op_and_dtype
def test_views_that_start_anywhere(op, dtype):
    """A contiguous view may start on any element, which vector accesses cannot take."""

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    inputs = make_inputs(small(op), dtype)
    moved = inputs._replace(tensors={name: shifted(t) for name, t in inputs.tensors.items()}, dout=shifted(inputs.dout))
    assert all(t.data_ptr() % 16 for t in moved.tensors.values())
    expected, got = on_simulator(op, inputs), on_simulator(op, moved)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-2, msg=name)


@every_op
def test_the_kernels_are_what_ran(op):
    """Every raw op of the op launches kernels, and each line of them that ran lies in csrc/cuda."""
    load().counted()
    with simulated(), RawCalls() as recorded:
        on_simulator(op, make_inputs(small(op), torch.bfloat16), count=True)
    assert {f"{func.__name__.split('.')[0]}" for func, *_ in recorded.calls} == set(hub(op).SCHEMAS)
    launches = load().counted()
    assert len(launches) >= 3  # forward, backward, the ordered sum of its partials
    assert all(line.file.startswith("csrc/cuda/") for launch in launches for line in launch.lines)


def test_float64_is_refused():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with simulated():
        assert select("residual_scale", x, x).backend != "cuda"
        with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' was asked for and cannot run: float64"):
            ops.residual_scale(x, x, torch.ones(3, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="float64, which the CUDA kernels do not serve"):
            getattr(torch.ops, NAMESPACE).residual_scale_fwd(x[None], x[None], None, None, torch.float64)


def test_a_failed_launch_says_why():
    inputs = make_inputs(small("depthwise_conv"), torch.float32)
    with pytest.raises(RuntimeError, match=r"depthwise_conv: the forward kernel was not launched: .*shared memory.*CUDA error"):
        on_simulator("depthwise_conv", inputs, shared_limit=1 << 10)
    on_simulator("depthwise_conv", inputs)


# --- patched models


def test_a_patched_model_runs_on_the_kernels():
    torch.manual_seed(0)
    model = ConvNeXt((1, 1, 1, 1), (16, 24, 40, 48), num_classes=5, drop_path_rate=0.2, layer_scale_init_value=0.5)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])

    def step():
        model.zero_grad()
        torch.manual_seed(1)
        logits = model(x)
        torch.nn.functional.cross_entropy(logits, target).backward()
        return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    expected = step()
    fastconv.patch(model, ops=("depthwise_conv_norm", "residual_scale"))  # gelu_linear has no CUDA kernels yet
    with simulated(), use_backend("cuda"), RawCalls() as recorded:
        got = step()
    called = {(func.namespace, func.__name__.split(".")[0]) for func, *_ in recorded.calls}
    wanted = {name for op in ("depthwise_conv_norm", "residual_scale") for name in hub(op).SCHEMAS}
    assert {name for namespace, name in called if namespace == NAMESPACE} >= wanted
    assert {namespace for namespace, _ in called} == {NAMESPACE}
    for name, value in expected.items():
        bound = (1e-5 if name == "logits" else 1e-4) * value.norm() + 1e-7
        assert (got[name] - value).norm() <= bound, name


# --- under the sanitizers


def chosen(largest: int) -> list[str]:
    """Cases of at most so many elements, each in one dtype in turn, as check.py takes them."""
    dtypes = {op: dtypes_of(op, "cuda") for op in OPS}
    cases = [(op, i, case, dtypes[op][i % len(dtypes[op])]) for op in OPS for i, case in enumerate(CASES[op])]
    return [
        f"{op}:{i}:{str(dtype).removeprefix('torch.')}"
        for op, i, case, dtype in cases
        if 0 < math.prod(case.shape) <= largest and dtype in case.dtypes
    ]


def check_in_process(variant: str, order: str, cases: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "simt.check", str(build.ops(variant)), order, *cases]
    return subprocess.run(command, env=build.environment(variant), capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    ("variant", "order", "largest"),
    (
        ("asan", "forward", 10**9),
        ("tsan", "random", 1600),
        *(pytest.param("asan", order, 10**9, marks=pytest.mark.slow) for order in ORDERS[1:]),
        *(pytest.param("tsan", order, 10**9, marks=pytest.mark.slow) for order in ORDERS),
    ),
)
@pytest.mark.timeout(1800)
def test_sanitizers_find_nothing(variant, order, largest):
    cases = chosen(largest)
    assert len(cases) >= 20 and {case.split(":")[0] for case in cases} == set(OPS)
    result = check_in_process(variant, order, cases)
    assert result.returncode == 0 and f"{len(cases)} cases hold" in result.stdout, result.stdout + result.stderr[-6000:]
