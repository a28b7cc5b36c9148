"""global_response_norm in the simulator, in each of its forms: two passes over memory, an image held by a block, or by a cluster.

What every op must do is held in test_simt_ops.py too, there with the form that its plan chooses on an sm_80.
"""

import itertools

import pytest
import torch
from simt import build
from simt.build import Bug
from simt.check import lazily
from simt.control import ORDERS, Launch
from simt.hub import NAMESPACE, load, simulated
from test_simt_counters import SHARED, count, wavefronts
from test_simt_faults import CONTRACT, CRASH, Fault, check, holds, race, says
from test_simt_ops import DTYPES, chosen, on_simulator, same_bits

import fastconv
from fastconv import use_backend
from fastconv.models.convnextv2 import ConvNeXtV2
from fastconv.ops._registry import hub
from fastconv.testing import CASES, Case, RawCalls, check_not_finite, check_op, formula, make_inputs, poisoned

OP = "global_response_norm"
# Settings of the simulator. Shared memory of so few bytes makes clusters of what one block could hold.
FORMS = {"two passes": {"cluster": 0}, "block": {"cluster": 1}, "cluster": {"cluster": 16, "shared_limit": 22 << 10}}
every_form = pytest.mark.parametrize("form", FORMS)
every_order = pytest.mark.parametrize("order", ORDERS)
# Of ConvNeXt V2-T at 224 x 224: the hidden channels of its four stages.
STAGES = {1: (1, 56, 56, 384), 2: (1, 28, 28, 768), 3: (1, 14, 14, 1536), 4: (2, 7, 7, 3072)}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # small tensors: more threads only wait for each other


def launches_of(op, inputs, wanted=None, **settings) -> list[Launch]:
    load().counted()
    on_simulator(op, inputs, wanted, count=True, **settings)
    return load().counted()


@every_order
@pytest.mark.parametrize("form", ("two passes", "cluster"))
def test_values_and_gradients(form, order):
    with simulated() as simulator, simulator.settings(order=order, **FORMS[form]):
        for case in CASES[OP]:
            for dtype in DTYPES:
                if dtype in case.dtypes:
                    check_op(case, dtype, "cuda")


@pytest.mark.parametrize("stage", (pytest.param(1, marks=pytest.mark.slow), 2, 3, 4))
def test_stages_of_convnextv2(stage):
    """As on an sm_90: clusters of 4 to 16 blocks of up to 220 KiB."""
    with simulated() as simulator, simulator.settings(cluster=16, shared_limit=SHARED["sm_90"], order="random"):
        check_op(Case(OP, STAGES[stage], act="gelu"), DTYPES[1 + stage % 2], "cuda")


@pytest.mark.parametrize(("form", "forward"), (("two passes", (6, 2, 6)), ("block", (2,)), ("cluster", (16,))))
def test_which_form_runs(form, forward):
    """Blocks of each launch. In two passes one for each 96 of 255 pixels; 32 to a block of a cluster of 8."""
    launches = launches_of(OP, make_inputs(Case(OP, (2, 17, 15, 48), act="gelu"), torch.bfloat16), **FORMS[form])
    blocks = tuple(launch.blocks for launch in launches)
    assert blocks[: len(forward)] == forward
    assert len(blocks) == 2 * len(forward) + 2  # the sums of dweight and dbias


@every_form
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_image_has_the_same_bits_in_any_order_and_any_batch(form, dtype):
    inputs = make_inputs(Case(OP, (3, 17, 9, 72), act="gelu"), dtype)
    first = on_simulator(OP, inputs, **FORMS[form])
    for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
        same_bits(on_simulator(OP, inputs, **FORMS[form], **settings), first)
    alone = inputs._replace(tensors={**inputs.tensors, "x": inputs.tensors["x"][1:2]}, dout=inputs.dout[1:2])
    for name, value in on_simulator(OP, alone, **FORMS[form]).items():
        assert name in ("dweight", "dbias") or torch.equal(value, first[name][1:2]), name


@every_form
def test_any_one_gradient(form):
    inputs = make_inputs(Case(OP, (2, 9, 15, 40), act="gelu_tanh"), torch.bfloat16)
    full = on_simulator(OP, inputs, **FORMS[form])
    for wanted in ((), ("x",), ("weight",), ("bias",)):
        same_bits(on_simulator(OP, inputs, wanted, **FORMS[form]), full)


@every_form
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_and_inf(form, dtype):
    case = Case(OP, (2, 9, 11, 24), act="gelu")
    with simulated() as simulator, simulator.settings(**FORMS[form]):
        for name, value in itertools.product(("x", "weight", "bias", "dout"), (float("nan"), float("inf"))):
            check_not_finite(case, dtype, "cuda", name, value, False)


@pytest.mark.parametrize("form", ("two passes", "cluster"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_values_on_large_maps(form, dtype):
    """Squares and their sums leave float16's range."""
    with simulated() as simulator, simulator.settings(**{**FORMS[form], "shared_limit": 96 << 10}):
        check_op(Case(OP, (1, 128, 128, 8), act="gelu", scale=1e3), dtype, "cuda")


@every_form
def test_the_activation_in_its_tails(form):
    """Relative precision where GELU is small, which the norm of the tolerance rule does not see: weight 0 leaves a + bias."""
    x = torch.linspace(-12, 6, 2048).view(1, 16, 8, 16)
    nothing = torch.zeros(16)
    for act in ("gelu", "gelu_tanh"):
        with simulated() as simulator, simulator.settings(**FORMS[form]), use_backend("cuda"), poisoned():
            y = fastconv.ops.global_response_norm(x, nothing, nothing, act=act).double()
        exact = formula(OP, x.double(), nothing.double(), nothing.double(), act=act)
        normal = exact.abs() > 1e-30
        error = ((y - exact) / exact)[normal].abs()
        assert normal.sum() > 1400 and error.max() < 2e-5 and error[x[normal].abs() < 3].max() < 1e-6


def test_more_images_than_a_launch_takes():
    x = lazily((2**27, 1, 1), torch.ones(1, 1, 1))
    with simulated(), pytest.raises(RuntimeError, match="134217728 images are more than a launch takes; split the batch"):
        getattr(torch.ops, NAMESPACE).global_response_norm_fwd(x, x[0, 0], x[0, 0], 1e-6, 0, x.dtype, False)


def test_a_patched_model_runs_on_the_kernels():
    torch.manual_seed(0)
    model = ConvNeXtV2((1, 1, 1, 1), (16, 24, 40, 48), num_classes=5, drop_path_rate=0.2)
    for parameter in model.parameters():
        if parameter.dim() != 4:
            torch.nn.init.normal_(parameter, std=0.3)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])

    def step():
        model.zero_grad()
        torch.manual_seed(1)
        logits = model(x)
        torch.nn.functional.cross_entropy(logits, target).backward()
        return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    expected = step()
    fastconv.patch(model, ops=("depthwise_conv_norm", OP, "residual_scale"))
    with simulated(), use_backend("cuda"), RawCalls() as recorded:
        got = step()
    assert {func.__name__.split(".")[0] for func, *_ in recorded.calls} >= set(hub(OP).SCHEMAS)
    for name, value in expected.items():
        bound = (1e-5 if name == "logits" else 1e-4) * value.norm() + 1e-7
        assert (got[name] - value).norm() <= bound, name


# --- traffic


@pytest.mark.parametrize("gpu", ("sm_80", "sm_90"))
@pytest.mark.parametrize("stage", STAGES)
def test_traffic(gpu, stage):
    """In bfloat16, in activations: 2 forward and 3 backward where the chip holds an image, else 3 and 5. Then partial sums,
    coefficients, statistics and the gradients of the parameters within 15% of that, at a batch of one or two images."""
    cluster = 16 if gpu == "sm_90" else 1
    traffic = count(OP, STAGES[stage], gpu=gpu, act="gelu", cluster=cluster)
    resident = {"fwd": gpu == "sm_90", "bwd": gpu == "sm_90" and stage > 1}
    for name, floor in {"fwd": (3, 2), "bwd": (5, 3)}.items():
        found, least = traffic[name], floor[resident[name]]
        assert least <= found.distinct + 1e-3 and found.distinct <= 1.01 * least, (name, found.distinct)
        assert found.total + found.rest <= 1.15 * least, (name, found.total, found.rest)
        for launch in found.launches:
            assert wavefronts(launch) <= 1.2, (name, wavefronts(launch))
            assert launch.shared_bytes <= SHARED[gpu]
        gradients = 2 * (name == "bwd")  # launches
        assert len(found.launches) == gradients + (1 if resident[name] else 3)
        assert found.launches[0].sum("accesses", space="shared") > 30


# --- sanitizers and seeded bugs

SETTINGS = {form: ",".join(f"{name}={value}" for name, value in FORMS[form].items()) for form in FORMS}


FEW = ((1, "two passes"), (3, "two passes"), (1, "cluster"))  # vectors, scalars in several slices, a cluster of four


every_sanitizer = pytest.mark.parametrize(
    ("variant", "order", "largest"),
    (
        ("asan", "reverse", 10**4),
        ("tsan", "random", 0),
        *(pytest.param("asan", order, 10**9, marks=pytest.mark.slow) for order in ORDERS),
        *(pytest.param("tsan", order, 10**4, marks=pytest.mark.slow) for order in ORDERS),
    ),
)


def sanitizers_find_nothing(op, few, variant, order, largest):
    """In the cases of up to so many elements, in two forms each; in `few` where there are none."""
    items = [f"{item}:{SETTINGS[form]}" for form in ("two passes", "cluster") for item in chosen(largest) if item.startswith(op)]
    items = items or [f"{op}:{case}:bfloat16:{SETTINGS[form]}" for case, form in few]
    holds(check(build.ops(variant), variant, order, *items), len(items))


@every_sanitizer
@pytest.mark.timeout(1800)
def test_sanitizers_find_nothing(variant, order, largest):
    sanitizers_find_nothing(OP, FEW, variant, order, largest)


PASSES = "cuda/image_passes.cuh"
SKELETON, FORWARD, BACKWARD = (f"cuda/global_response_norm{name}" for name in (".cuh", "_kernel.cu", "_bwd_kernel.cu"))
GEOMETRY, ACTIVATION = "geometry.h", "cuda/activation.cuh"
FIRST_MEETING = Bug(SKELETON, "sync_cluster();\n  const SharedCoefficients", "sync_threads();\n  const SharedCoefficients")
LAST_MEETING = Bug(SKELETON, "sync_cluster();  // the coefficients", "sync_threads();  // the coefficients")
FAULTS = {
    "sums of other blocks before they are there": race("cluster", FIRST_MEETING, f"{OP}:1:bfloat16:{SETTINGS['cluster']}"),
    "a block leaves while others read its sums": Fault(
        "cluster", LAST_MEETING, f"{OP}:4:bfloat16:{SETTINGS['cluster']}", "a block exits before it has met those that read"
    ),
    "too little shared memory": Fault(
        "overrun", Bug(GEOMETRY, "(sums * (C + 2 * half)", "(sums * (C + half)"), f"{OP}:0:bfloat16", "outside of shared memory at"
    ),
    "rows of threads summed over those before": race(
        "live-buffer overwrite",
        Bug(PASSES, "    sync_threads();\n  }\n}\n\n// A block's sums", "  }\n}\n\n// A block's sums"),
        f"{OP}:8:float32:{SETTINGS['two passes']}",
    ),
    "32-bit offset of a pixel": Fault(
        "int32 offset",
        Bug(PASSES, "load_raw<N>(a, held.origin + offset, in)", "load_raw<N>(a, int(held.origin + offset), in)"),
        f"{OP}:huge:{SETTINGS['two passes']}",
        f"Segmentation fault|{OP} huge",
        (CRASH, CONTRACT),
    ),
    "one partial for all slices": Fault(
        "two blocks on one address",
        Bug(SKELETON, "p.partial + index * Direction::kSums", "p.partial + index / slices * slices * Direction::kSums"),
        f"{OP}:3:float32:{SETTINGS['two passes']}",
        "not finite|exceeds",
    ),
}
WRONG = {
    "a slice lost": (
        Bug(PASSES, "for (int64_t slice = 0; slice < slices; ++slice) sum", "for (int64_t slice = 1; slice < slices; ++slice) sum"),
        "two passes",
    ),
    "a block's sums lost": (Bug(PASSES, "other = 0; other < blocks", "other = 1; other < blocks"), "cluster"),
    "the mean of the norms without gradient": (Bug(BACKWARD, "* inverse - through_mean;", "* inverse;"), "block"),
    "the density lost": (Bug(ACTIVATION, "fmaf(x * density, 0.398942280f, cdf)", "cdf"), "block"),
    "the last pixel alone": (Bug(FORWARD, "fmaf(a[i], a[i], sums[0][i])", "a[i] * a[i]"), "block"),
    "the halves of eight channels swapped": (
        Bug(
            SKELETON,
            "for (int i = 0; i < N; i += 4) {\n      const auto part = load_shared<Vec<float, 4>>(at(r, c + i)",
            "for (int i = 0; i < N; i += 4) {\n      const auto part = load_shared<Vec<float, 4>>(at(r, c + N - 4 - i)",
        ),
        "cluster",
    ),
}
QUICK = ("a block leaves while others read its sums",)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, marks=() if name in QUICK and order == "forward" else pytest.mark.slow)
        for name in FAULTS
        for order in ORDERS
    ],
)
def test_a_seeded_bug_is_caught(name, order):
    fault = FAULTS[name]
    says(check(build.ops(fault.variant, (fault.bug,)), fault.variant, order, fault.item), fault)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "a block's sums lost" else pytest.mark.slow) for name in WRONG])
def test_a_wrong_sum_is_caught(name):
    bug, form = WRONG[name]
    items = [f"{OP}:4:{dtype}:{SETTINGS[form]}" for dtype in ("float32", "bfloat16")]
    says(check(build.ops("plain", (bug,)), "plain", "forward", *items), Fault("", bug, "", "not finite|exceeds"))


@every_form
def test_offsets_past_2_31(form):
    holds(check(build.ops(), "plain", "forward", f"{OP}:huge:{SETTINGS[form]}"), 1)
