"""squeeze_excite in the simulator, in each of its forms and in both layouts, as test_simt_response.py has global_response_norm.

What every op must do is held in test_simt_ops.py too, there with the form that its plan chooses on an sm_80.
"""

import itertools

import pytest
import torch
from simt import build
from simt.build import Bug
from simt.check import lazily
from simt.control import ORDERS
from simt.hub import NAMESPACE, simulated
from test_simt_counters import SHARED, count, wavefronts
from test_simt_faults import CONTRACT, CRASH, Fault, check, holds, race, says
from test_simt_ops import DTYPES, on_simulator, same_bits
from test_simt_response import FORMS, SETTINGS, every_form, every_sanitizer, launches_of, sanitizers_find_nothing

import fastconv
from fastconv import _C, use_backend
from fastconv.models.efficientnet import EfficientNet, Stage
from fastconv.ops.squeeze_excite import ACTS, GATES, SCHEMAS
from fastconv.testing import CASES, Case, RawCalls, check_not_finite, check_op, make_inputs

OP = "squeeze_excite"
NCHW = (("data_format", "NCHW"),)
every_layout = pytest.mark.parametrize("options", ((), NCHW), ids=("NHWC", "NCHW"))
# (H = W, C, R) of EfficientNet-B0 and RegNetY-032 at 224 x 224 pixels, as in benchmarks/bench_squeeze_excite.py.
SITES = {
    "silu": ((112, 32, 8), (56, 96, 4), (28, 144, 6), (28, 240, 10), (14, 480, 20), (14, 672, 28), (7, 1152, 48)),
    "relu": ((56, 72, 18), (28, 216, 54), (14, 576, 144), (7, 1512, 144)),
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # small tensors: more threads only wait for each other


@pytest.mark.parametrize("order", ("forward", *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS if order != "forward")))
@pytest.mark.parametrize("form", ("two passes", "cluster"))
def test_values_and_gradients(form, order):
    with simulated() as simulator, simulator.settings(order=order, **FORMS[form]):
        for case in CASES[OP]:
            for dtype in DTYPES:
                if dtype in case.dtypes:
                    check_op(case, dtype, "cuda")


@pytest.mark.parametrize("form", ("two passes", "cluster"))
@every_layout
def test_every_function(form, options):
    with simulated() as simulator, simulator.settings(order="random", **FORMS[form]):
        for act, gate in itertools.product(ACTS, GATES):
            check_op(Case(OP, (2, 4, 6, 24), act=act, reduced=4, options=(*options, ("gate", gate))), torch.float32, "cuda")


@pytest.mark.parametrize(
    ("shape", "reduced"),
    (((2, 1, 1, 4096), 1), ((6, 1, 1, 8), 1), ((2, 2, 4, 8), 2), ((1, 3, 5, 4095), 3), ((1, 2, 2, 768), 512), ((2, 3, 4, 12), 3)),
    ids=str,
)
@every_layout
def test_extreme_widths(shape, reduced, options):
    """H * W = 1, C from 8 to 4096, reduced widths from 1 on; rows of 12 channels or pixels move by fours."""
    for form in FORMS:
        with simulated() as simulator, simulator.settings(**{**FORMS[form], "shared_limit": 64 << 10}):
            for dtype in DTYPES[:2]:
                check_op(Case(OP, shape, act="silu", reduced=reduced, options=options), dtype, "cuda")


@every_layout
@pytest.mark.parametrize(("form", "forward"), (("two passes", (6, 18)), ("block", (2, 2)), ("cluster", (16, 16))))
def test_which_form_runs(form, forward, options):
    """Blocks of each launch. In two passes one for each 96 of 256 pixels of all channels, or for 8 of 72 planes."""
    blocks = [launch.blocks for launch in launches_of(OP, inputs_of((2, 16, 16, 72), options), **FORMS[form])]
    passes = [forward[bool(options)]] * 2
    passes[1:1] = [2] * (form == "two passes")  # the layers
    passes = passes if form == "two passes" else passes[:1]
    assert blocks[: len(passes)] == passes
    assert len(blocks) == 2 * len(passes) + 2  # the gradients of the layers


def inputs_of(shape, options=(), dtype=torch.bfloat16, **case):
    return make_inputs(Case(OP, shape, act="silu", reduced=8, options=options, **case), dtype)


@every_form
@every_layout
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_image_has_the_same_bits_in_any_order_and_any_batch(form, options, dtype):
    inputs = inputs_of((3, 16, 9, 72), options, dtype)
    first = on_simulator(OP, inputs, **FORMS[form])
    for settings in ({"order": "reverse"}, {"order": "random", "seed": 3}, {"workers": 2}):
        same_bits(on_simulator(OP, inputs, **FORMS[form], **settings), first)
    alone = inputs._replace(tensors={**inputs.tensors, "x": inputs.tensors["x"][1:2]}, dout=inputs.dout[1:2])
    for name, value in on_simulator(OP, alone, **FORMS[form]).items():
        assert name not in ("out", "dx") or torch.equal(value, first[name][1:2]), name


@every_form
@pytest.mark.parametrize("without", ((), ("w2", "b2")), ids=str)
def test_any_one_gradient(form, without):
    inputs = inputs_of((2, 9, 15, 40), without=without)
    full = on_simulator(OP, inputs, **FORMS[form])
    for wanted in ((), *((name,) for name, tensor in inputs.tensors.items() if tensor is not None)):
        same_bits(on_simulator(OP, inputs, wanted, **FORMS[form]), full)


@pytest.mark.parametrize("form", ("two passes", "cluster"))
@every_layout
def test_nan_and_inf(form, options):
    case = Case(OP, (2, 8, 8, 8), act="silu", options=options)  # a cube: the element is found in either layout
    with simulated() as simulator, simulator.settings(**FORMS[form]):
        for name, value in itertools.product(("x", "w1", "b1", "w2", "b2", "dout"), (float("nan"), float("inf"))):
            check_not_finite(case, torch.float32, "cuda", name, value, False)


@pytest.mark.parametrize("form", ("two passes", "cluster"))
@every_layout
def test_large_values_on_large_maps(form, options):
    """Sums leave float16's range."""
    with simulated() as simulator, simulator.settings(**{**FORMS[form], "shared_limit": 96 << 10}):
        check_op(Case(OP, (1, 136, 128, 8), act="relu", reduced=2, scale=1e2, options=options), torch.float16, "cuda")


def test_more_images_than_a_launch_takes():
    x = lazily((2**27, 1, 1, 1), torch.ones(1, 1, 1, 1))
    w = torch.ones(1, 1, dtype=x.dtype)
    with simulated(), pytest.raises(RuntimeError, match="134217728 images are more than a launch takes; split the batch"):
        getattr(torch.ops, NAMESPACE).squeeze_excite_fwd(x, w, None, w, None, 0, 6, x.dtype, True, False)


def test_a_patched_model_runs_on_the_kernels():
    torch.manual_seed(0)
    stages = [Stage("ds", 1, 3, 1, 1, 8), Stage("ir", 1, 3, 2, 4, 16), Stage("ir", 1, 5, 2, 4, 24)]
    model = EfficientNet(stages, stem=8, features=32, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)

    def step():
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    expected = step()
    report = fastconv.patch(model, ops=(OP,))
    with simulated(), use_backend("cuda"), RawCalls() as recorded:
        got = step()
    assert len(report.fused) == 3
    assert {func.__name__.split(".")[0] for func, *_ in recorded.calls} == set(SCHEMAS)
    for name, value in expected.items():
        assert (got[name] - value).norm() <= (1e-5 if name == "logits" else 1e-4) * value.norm() + 1e-7, name


# --- traffic


@pytest.mark.parametrize("gpu", ("sm_80", "sm_90"))
@pytest.mark.parametrize(
    ("act", "site"),
    [pytest.param(act, site, marks=pytest.mark.slow if site[0] > 28 else ()) for act, sites in SITES.items() for site in sites],
    ids=str,
)
@every_layout
def test_traffic(act, site, gpu, options):
    """In bfloat16, in activations: 2 forward and 3 backward where the chip holds an image, else 3 and 4. What
    else there is, at a batch of 128 images that share the weights, within 15% of that."""
    size, C, R = site
    cluster = 16 if gpu == "sm_90" else 1
    one, two = (count(OP, (n, size, size, C), gpu=gpu, cluster=cluster, act=act, reduced=R, options=options) for n in (1, 2))
    run = size * size if options else C  # planes of 196 and 49 elements begin inside of sectors, some of which two warps ask for
    width, again = next((w, again) for w, again in ((8, 1.05), (4, 1.15), (1, 1.65)) if run % w == 0)
    resident = _C.cuda_gate_plan(size * size, C, not options, width, 2, SHARED[gpu], cluster)[0] > 0
    assert resident or gpu == "sm_80" or width == 1
    for name, least in {"fwd": 3 - resident, "bwd": 4 - resident}.items():
        found, an_image = one[name], 2 * two[name].rest - one[name].rest
        shared = found.rest - an_image
        assert least <= found.distinct + 1e-3 and found.distinct <= 1.01 * least, found.distinct
        assert found.total <= again * least, found.total
        assert found.distinct + an_image + shared / 128 <= 1.15 * least, (an_image, shared)
        assert len(found.launches) == (1 if resident else 3) + 2 * (name == "bwd")
        for launch in found.launches:
            assert wavefronts(launch) <= 1.2, (name, wavefronts(launch))
            assert launch.shared_bytes <= SHARED[gpu]


# --- sanitizers and seeded bugs

FEW = ((0, "two passes"), (2, "two passes"), (4, "cluster"), (9, "cluster"), (24, "two passes"))


@every_sanitizer
@pytest.mark.timeout(1800)
def test_sanitizers_find_nothing(variant, order, largest):
    sanitizers_find_nothing(OP, FEW, variant, order, largest)


PASSES, LAYERS = "cuda/image_passes.cuh", "cuda/gate_layers.cuh"
SKELETON, FORWARD, BACKWARD = (f"cuda/squeeze_excite{name}" for name in (".cuh", "_kernel.cu", "_bwd_kernel.cu"))
ONE, CLUSTER, TWO = (f"{OP}:4:bfloat16:{SETTINGS[form]}" for form in ("block", "cluster", "two passes"))
MANY_IMAGES = f"{OP}:24:float32:{SETTINGS['two passes']}"


def wrong(bug: Bug, item: str) -> Fault:
    return Fault("", bug, item, "not finite|exceeds")


FAULTS = {
    "sums of other blocks before they are there": race(
        "cluster",
        Bug(
            SKELETON,
            "sync_cluster();\n    Direction::layers(p, image, team, [&](int64_t c) { return sum_of_c",
            "sync_threads();\n    Direction::layers(p, image, team, [&](int64_t c) { return sum_of_c",
        ),
        CLUSTER,
    ),
    "the first layer before the means are whole": race(
        "cluster", Bug(FORWARD, "sync_cluster();\n    if (two) {", "sync_threads();\n    if (two) {"), CLUSTER
    ),
    "a layer scaled with before it is whole": race(
        "cluster", Bug(FORWARD, "    });\n    sync_cluster();\n  }\n", "    });\n    sync_threads();\n  }\n"), CLUSTER
    ),
    "too little shared memory": Fault(
        "overrun", Bug("geometry.h", "4 * (round_up(C, 4) + response", "4 * (response"), f"{OP}:0:bfloat16", "outside of shared memory at"
    ),
    "images of a layer's gradient over those before": wrong(
        Bug(BACKWARD, "sync_threads();  // the images before have been read", ""), MANY_IMAGES
    ),
    "32-bit offset of a pixel": Fault(
        "int32 offset",
        Bug(PASSES, "load_raw<N>(a, held.origin + offset, in)", "load_raw<N>(a, int(held.origin + offset), in)"),
        f"{OP}:huge:{SETTINGS['two passes']}",
        f"Segmentation fault|{OP} huge",
        (CRASH, CONTRACT),
    ),
    "a slice lost": wrong(Bug(PASSES, "for (int64_t slice = 0;", "for (int64_t slice = 1;"), f"{OP}:6:float32:{SETTINGS['two passes']}"),
    "a block's sums lost": wrong(Bug(PASSES, "other = 0; other < blocks", "other = 1; other < blocks"), CLUSTER),
    "a block's share of the gradient lost": wrong(
        Bug(BACKWARD, "sum_of_slices(shares + r, team.blocks, p.R)", "sum_of_slices(shares + r, 1, p.R)"), CLUSTER
    ),
    "no gradient through the mean": wrong(Bug(SKELETON, "fmaf(v[i], factor[i], term[i])", "v[i] * factor[i]"), ONE),
    "the last rows of a layer lost": wrong(
        Bug(LAYERS, "store(m, sums[i], m < end && lane == 0);", "store(m, sums[i], m + 1 < end && lane == 0);"), TWO
    ),
}
QUICK = (
    "a block's share of the gradient lost",
    "images of a layer's gradient over those before",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS])
def test_a_seeded_bug_is_caught(name):
    fault = FAULTS[name]
    says(check(build.ops(fault.variant, (fault.bug,)), fault.variant, "forward", fault.item), fault)


@pytest.mark.parametrize("form", ("two passes", "cluster"))
def test_offsets_past_2_31(form):
    holds(check(build.ops(), "plain", "forward", f"{OP}:huge:{SETTINGS[form]}"), 1)
