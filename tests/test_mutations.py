"""Seeded bugs must turn the op contract red: a suite that lets one pass proves nothing about the kernels it lets pass.

The C++ mutants are text substitutions in a copy of csrc, each found exactly once, compiled without optimisation for the
baseline level and loaded in place of the real library. The hub's mutants spoil one result of one raw op.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastconv.ops import _registry
from fastconv.ops._registry import OPS
from fastconv.testing import CASES, check_op

CSRC = pathlib.Path(__file__).parent.parent / "csrc"
GLUE = ("ops", "depthwise_conv", "depthwise_conv_norm", "gelu_linear", "global_response_norm", "grouped_conv", "residual_scale")
GLUE += ("linear", "squeeze_excite", "window_attention")
KERNELS = ("kernels_default",)
COMPILER = os.environ.get("CXX", "c++").split()
FLAGS = ["-O0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
# The tables of the other levels, which the baseline never touches, without compiling them.
NO_OTHER_LEVELS = """
#include "cpu/kernels.h"
namespace fastconv::cpu {
#if defined(__x86_64__)
extern const Kernels kernels_avx2{}, kernels_avx512{};
#endif
}
"""

CONV, NORM, TAIL = "depthwise_conv_kernel.h", "layer_norm_kernel.h", "residual_scale_kernel.h"
GROUPED = "grouped_conv_kernel.h"
# name: file, the code, the bug, ops that must turn red
MUTANTS = {
    "forward taps mirrored": (
        CONV,
        "acc[c - kw] += tap[kw] * v;",
        "acc[c - kw] += tap[kK - 1 - kw] * v;",
        ("depthwise_conv", "depthwise_conv_norm"),
    ),
    "taps of other K mirrored": (CONV, "load(in + (kw + j) * kLanes<A>)", "load(in + (K - 1 - kw + j) * kLanes<A>)", ("depthwise_conv",)),
    "halo rows missing": (CONV, "next = h0 > pad ? h0 - pad : 0;", "next = h0;", ("depthwise_conv", "depthwise_conv_norm")),
    "halo columns missing": (CONV, "right = K / 2 + count;", "right = count;", ("depthwise_conv", "depthwise_conv_norm")),
    "H and W swapped": (CONV, "pad(s.pad()), H(s.H)", "pad(s.pad()), H(s.W)", ("depthwise_conv", "depthwise_conv_norm")),
    "taps of dweight mirrored": (CONV, "acc[r][j - c + kK - 1] += pixel[j] * v;", "acc[r][c - j] += pixel[j] * v;", ("depthwise_conv",)),
    "weights not flipped": (CONV, "flip ? taps - 1 - k : k", "k", ("depthwise_conv", "depthwise_conv_norm")),
    "bias gradient dropped": (CONV, "dbias[w & 3] += load(dz + w * kLanes<A>);", "(void)dz;", ("depthwise_conv", "depthwise_conv_norm")),
    "a term of the norm lost": (
        CONV,
        "(g * load_as(dy + w * s.C) - coupling[2 * w] - xhat * coupling[2 * w + 1])",
        "(g * load_as(dy + w * s.C) - coupling[2 * w])",
        ("depthwise_conv_norm",),
    ),
    "gradient of the shortcut lost": (CONV, "more ? v + load_lanes<A>(more + w * s.C, lanes) : v", "v", ("depthwise_conv_norm",)),
    "eps lost": (NORM, " + static_cast<A>(p.eps)", "", ("depthwise_conv_norm",)),
    "mean without the last channels": (NORM, "if (tail) sum += load_lanes<A>(z + full, tail);", "", ("depthwise_conv_norm",)),
    "dnorm_bias of one pixel in four": (NORM, "db += d;", "db += i ? zero<A>() : d;", ("depthwise_conv_norm",)),
    "halo rows of the norm lost": (
        CONV,
        "couple<A, false>(p, pixel(h1), pixel(halo_h1), norm_row, out(h1), nullptr);",
        "",
        ("depthwise_conv_norm",),
    ),
    "partial sum lost": (
        "glue.h",
        "slice < slices; ++slice)\n        for",
        "slice + 1 < slices; ++slice)\n        for",
        tuple(sorted({*OPS} - {"gelu_linear", "squeeze_excite", "window_attention"})),  # which add up their own
    ),
    "mask forgotten": (TAIL, "load_lanes<A>(y + row + c, lanes) * mask;", "load_lanes<A>(y + row + c, lanes);", ("residual_scale",)),
    "mask forgotten in dgamma": (TAIL, "+ sum * mask, lanes)", "+ sum, lanes)", ("residual_scale",)),
    "dgamma of the last chunk alone": (TAIL, "load_lanes<A>(dgamma + c, lanes) + sum * mask", "sum * mask", ("residual_scale",)),
    "sum of the last pixel alone": ("global_response_norm_kernel.h", "first += a * d;", "first = a * d;", ("global_response_norm",)),
    "last band lost": ("global_response_norm.cpp", "band < p.bands; ++band", "band + 1 < p.bands; ++band", ("global_response_norm",)),
    "mean of the norms without gradient": ("global_response_norm.cpp", "* scale - through_mean;", "* scale;", ("global_response_norm",)),
    "gelu over dy before it is read": (
        "activation_kernel.h",
        "store_lanes<A>(dx + i, load_lanes<A>(dy + i, lanes) * a.slope, lanes);",
        "if (p.y.data) store_lanes<A>(y + i, a.value, lanes); store_lanes<A>(dx + i, load_lanes<A>(dy + i, lanes) * a.slope, lanes);",
        ("gelu_linear",),
    ),
    "density lost": ("activation_kernel.h", "cdf + x * density * 0.398942280f", "cdf", ("gelu_linear", "global_response_norm")),
    "weights of the first group": (
        "grouped_conv.cpp",
        "((g * c.out_width + o) * c.in_width + i)",
        "(o * c.in_width + i)",
        ("grouped_conv",),
    ),
    "taps of dx a pixel off": (
        "grouped_conv.cpp",
        "(phase + padding - k) / stride",
        "(phase + padding + 1 - k) / stride",
        ("grouped_conv",),
    ),
    "phases of the stride mixed": (GROUPED, "h % p.stride_h * p.stride_w + w % p.stride_w", "w % p.stride_w", ("grouped_conv",)),
    "dweight of the last band alone": (GROUPED, "store(sum, load(sum) + acc[r][t]);", "store(sum, acc[r][t]);", ("grouped_conv",)),
    "half stores truncate": ("vec.h", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16", ("rounding",)),
}
GATE, LAYER = "squeeze_excite_kernel.h", "layer_kernel.h"
MUTANTS |= {
    "pixels of the last rows lost": (GATE, ", add(std::integral_constant<int, 1>{});", ";", ("squeeze_excite",)),
    "one chunk of a plane": (GATE, "i < L; i += kPlaneRun", "i < kPlaneRun; i += kPlaneRun", ("squeeze_excite",)),
    "lanes of a layer mixed up": ("vec.h", "I % kHalf + kHalf)...)", "I % kHalf)...)", ("squeeze_excite",)),
    "a layer's last inputs lost": (LAYER, "if (full < K) {", "if (full > K) {", ("squeeze_excite",)),
    "derivative of the act lost": (LAYER, "if (p.gradient_at) v = ", "if (p.gradient_at) ", ("squeeze_excite",)),
    "gate of another image": (GATE, "factor + n * C", "factor", ("squeeze_excite",)),
    "repeated gate of another image": (GATE, "ready = n == image", "ready = image >= 0", ("squeeze_excite",)),
    "planes that start late": (GATE, "store_as(out, value(0, kLanes<A>));", "", ("squeeze_excite",)),
}
WINDOW, ONLY = "window_attention_kernel.h", ("window_attention",)
MUTANTS |= {
    "shift the other way": (WINDOW, "i < size ? (i + shift) % size : size", "i < size ? (i + size - shift) % size : size", ONLY),
    "one region fewer": (WINDOW, "2 * (last_row && a >= p.wh - p.sh) + ", "", ONLY),
    "bias of the pair turned round": (WINDOW, "row = (a - c + p.wh - 1)", "row = (c - a + p.wh - 1)", ONLY),
    "first lanes of pad_bias again": (WINDOW, "load_lanes<A>(pad + d, lanes)", "load_lanes<A>(pad, lanes)", ONLY),
    "gradient of pad_bias of the last token alone": (WINDOW, "store(sum + d, load(sum + d) + load(rows", "store(sum + d, load(rows", ONLY),
    "left-over key not in the sum": (WINDOW, "Nv < N ? load(inverse + r) + load(last + r) : load", "load", ONLY),
    "norm without gradient": (WINDOW, "load(row + d) * along)", "load(row + d) * A(0))", ONLY),
    "slice of windows lost": ("window_attention.cpp", "slice < p.slices; ++slice", "slice + 1 < p.slices; ++slice", ONLY),
}
LINEAR, ONLY = "linear_kernel.h", ("linear_wgrad",)
MUTANTS |= {
    "dweight of the last rows alone": (LINEAR, "load(c + r * c_row + v * kLanes<A>) + sum[r][v]", "sum[r][v]", ONLY),
    "dbias of the last rows alone": (LINEAR, "dbias[d] += static_cast<double>(recent[d])", "dbias[d] = recent[d]", ONLY),
    "first block of columns again": (LINEAR, "first_c(task % p.blocks_c * p.block_c)", "first_c(0)", ONLY),
    "first row of a group again": (LINEAR, "dy(first + k + q) + d", "dy(first + k) + d", ONLY),
}
QUICK = (
    "one region fewer",
    "one chunk of a plane",
    "derivative of the act lost",
    "forward taps mirrored",
    "halo rows missing",
    "H and W swapped",
    "bias gradient dropped",
    "a term of the norm lost",
    "partial sum lost",
    "density lost",
    "weights of the first group",
)

# Loads the library given on the command line where `import fastconv` loads its own, and holds an op to its contract.
# Exit status 3: the contract was broken and said so. Anything else that is not 0 is a crash, which proves nothing.
DRIVER = """
import sys, torch
path, op, tests = sys.argv[1:4]
load = torch.ops.load_library
torch.ops.load_library = lambda built: load(path if built.endswith("_ops_cpu.so") else built)
from fastconv.testing import CASES, check_op
from fastconv import _library
if _library.cpu_missing or path not in torch.ops.loaded_libraries or torch.ops.fastconv.cpu_capability() != "default":
    sys.exit(_library.cpu_missing or "the wrong library was loaded")
torch.set_num_threads(1)
try:
    if op == "rounding":
        sys.path.insert(0, tests)
        from test_cpu_kernels import test_rounding_to_half
        test_rounding_to_half(torch.bfloat16)
    elif op == "linear_wgrad":
        sys.path.insert(0, tests)
        from test_linear_wgrad import check_integers
        check_integers()
    else:
        for case in sorted(CASES[op], key=lambda case: case.shape[-2:][0] - case.shape[:2][-1]):  # tall maps first
            check_op(case, torch.float32, "cpu")
except AssertionError as error:
    print(op, error)
    sys.exit(3)
"""


def compile_object(source: pathlib.Path, root: pathlib.Path, target: pathlib.Path) -> None:
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{root}", *(f"-isystem{path}" for path in include_paths())]
    command = [*COMPILER, *FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes, "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def link(objects: list[pathlib.Path], target: pathlib.Path) -> pathlib.Path:
    from torch.utils.cpp_extension import library_paths

    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([*COMPILER, "-shared", *map(str, objects), *libraries, "-o", str(target)], check=True, timeout=120)
    return target


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Objects of the code as it is, by stem; a mutant compiles again only what it touches."""
    folder = tmp_path_factory.mktemp("objects")
    (folder / "other_levels.cpp").write_text(NO_OTHER_LEVELS)
    sources = {stem: CSRC / "cpu" / f"{stem}.cpp" for stem in (*GLUE, *KERNELS)} | {"other_levels": folder / "other_levels.cpp"}
    built = {stem: folder / f"{stem}.o" for stem in sources}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stem: compile_object(sources[stem], CSRC, built[stem]), sources))
    return built


def contract(library: pathlib.Path, op: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTCONV_")}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(library), op, str(pathlib.Path(__file__).parent)],
        env={**environment, "FASTCONV_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_code_as_it_is_passes(objects, tmp_path):
    """Built in the same way: what turns a mutant red is the mutation."""
    library = link(list(objects.values()), tmp_path / "same.so")
    for op in (*sorted(OPS), "rounding", "linear_wgrad"):
        result = contract(library, op)
        assert result.returncode == 0, (op, result.stdout[-2000:], result.stderr[-2000:])


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS])
def test_a_mutated_kernel_turns_red(name, objects, tmp_path):
    file, code, bug, reds = MUTANTS[name]
    root = shutil.copytree(CSRC, tmp_path / "csrc")
    path = root / "cpu" / file
    text = path.read_text()
    assert text.count(code) == 1, f"{file} holds the code to mutate {text.count(code)} times: {code!r}"
    path.write_text(text.replace(code, bug))
    mutated = {}
    for stem in GLUE if file == "glue.h" else (file.removesuffix(".cpp"),) if file.endswith(".cpp") else KERNELS:
        mutated[stem] = tmp_path / f"{stem}.o"
        compile_object(root / "cpu" / f"{stem}.cpp", root, mutated[stem])
    library = link(list({**objects, **mutated}.values()), tmp_path / "mutant.so")
    for op in reds:
        result = contract(library, op)
        assert result.returncode == 3, (op, result.returncode, result.stderr[-2000:])


def test_every_mutant_names_real_code():
    """The slow mutants too, at every run: a substitution that no longer applies is noticed at once."""
    assert set(QUICK) < MUTANTS.keys()
    for file, code, *_ in MUTANTS.values():
        assert (CSRC / "cpu" / file).read_text().count(code) == 1, (file, code)


def off_channel(t):
    t = t.clone()
    t.movedim(-1 if t.dim() != 4 or t.shape[1] != 1 else 0, 0)[-1:] += t.square().mean().sqrt()
    return t


SPOILS = {
    "zero": torch.zeros_like,
    "never written": torch.empty_like,  # NaN where memory is poisoned
    "one channel off": off_channel,
    "off by 5 percent": lambda t: t * 1.05,
    "turned over": lambda t: t.flip(-1 if t.dim() < 4 else -2),
}
COARSE = ("zero", "never written", "turned over")  # what no rounding to bfloat16 may hide in any result


def spoil(monkeypatch, name: str, index: int, change) -> list:
    """Make the raw op `name` change result `index`, one of what it returns or writes over; the list tells how often that made a
    difference."""
    real, applied = _registry.raw, []

    def raw(asked, backend):
        function = real(asked, backend)
        if asked != name:
            return function

        def spoiled(*args):
            results = function(*args)
            single = isinstance(results, torch.Tensor)
            results = [results] if single else list(results)
            outcomes = results + [arg for arg, schema in zip(args, function._schema.arguments) if schema.is_write]
            changed = change(outcomes[index])
            if not torch.equal(changed, outcomes[index]):
                applied.append(name)
            if index < len(results):
                results[index] = changed
            else:
                outcomes[index].copy_(changed)
            return results[0] if single else tuple(results)

        return spoiled

    monkeypatch.setattr(_registry, "raw", raw)
    return applied


def results_of(op: str) -> list[tuple[str, int]]:
    counts = {name: schema.split("->")[1].count("Tensor") + schema.count("!") for name, schema in _registry.hub(op).SCHEMAS.items()}
    return [(name, i) for name, count in counts.items() for i in range(count)]


@pytest.mark.parametrize("kind, dtype", [*((k, torch.float32) for k in SPOILS), *((k, torch.bfloat16) for k in COARSE)])
@pytest.mark.parametrize("op, name, index", [(op, name, index) for op in sorted(OPS) for name, index in results_of(op)])
def test_a_spoilt_result_turns_red(op, name, index, kind, dtype, monkeypatch):
    """Every tensor that a raw op returns or writes over, statistics kept for backward among them, is under the contract."""
    case = next(c for c in CASES[op] if not c.without and not c.wide and c.C == 33)
    check_op(case, dtype, "cpu")
    applied = spoil(monkeypatch, name, index, SPOILS[kind])
    with pytest.raises(AssertionError, match=f"{op} "):
        check_op(case, dtype, "cpu")
    assert applied


@pytest.mark.parametrize("op, first, second", (("depthwise_conv_norm", 2, 4), ("depthwise_conv_norm", 3, 4)))
def test_swapped_gradients_turn_red(op, first, second, monkeypatch):
    real = _registry.raw

    def raw(asked, backend):
        function = real(asked, backend)

        def swapped(*args):
            results = list(function(*args))
            results[first], results[second] = results[second], results[first]
            return tuple(results)

        return swapped if asked == f"{op}_bwd" else function

    monkeypatch.setattr(_registry, "raw", raw)
    with pytest.raises(AssertionError, match=f"{op} "):
        check_op(CASES[op][2], torch.float32, "cpu")


def test_a_silent_fallback_turns_red(monkeypatch):
    """A hub that runs the reference where the kernels were asked for is caught, though its values are right."""
    monkeypatch.setattr(_registry, "select", lambda *tensors: _registry.Choice("eager"))
    monkeypatch.setattr("fastconv.testing.select", _registry.select)
    with pytest.raises(AssertionError):
        check_op(CASES["residual_scale"][0], torch.float32, "cpu")
