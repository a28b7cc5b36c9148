"""The CUDA library, without a GPU: that it is built from these sources without warnings, loads, and what its kernels use.

`python tests/test_cuda_build.py` rewrites cuda_resources.txt, the registers and shared memory that kernels may use.
"""

import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from fastconv import _library, doctor
from fastconv.ops import _registry

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = ROOT / "fastconv/_ops_cuda.so"
NINJA = ROOT / "build/cuda/build.ninja"
REMEDY = "make test, or FASTCONV_WERROR=1 python setup.py build_ext --inplace"
TABLE = pathlib.Path(__file__).with_name("cuda_resources.txt")
# Kernels without 128-bit accesses, as patterns: sums of partials, any K, and rows that do not lie on 16 bytes.
SCALAR = (
    *(r"reduce_partials_kernel", r"conv_general_\w*kernel", r"(residual_scale|layer_norm)_\w+_kernel<1>"),
    r"global_response_norm_(sum|apply)_kernel<1, \w+>|global_response_norm_coefficients_kernel<\w+>",
    *(r"squeeze_excite_(sum|scale)_kernel<1, \w+, \w+>", r"squeeze_excite_weight_kernel"),
)
# Partial sums, a sum of each plane, or vectors alone.
SCALAR_STORES = (
    r"grouped_conv_mma_wgrad_kernel<.*>",
    *(r"squeeze_excite_sum_kernel<[48], \w+, false>", r"squeeze_excite_gate_kernel<Forward>"),
)


def nvcc() -> str | None:
    if os.environ.get("CUDA_HOME"):
        return shutil.which(os.path.join(os.environ["CUDA_HOME"], "bin/nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


pytestmark = pytest.mark.skipif(nvcc() is None or torch.version.cuda is None, reason="needs nvcc and a CUDA build of torch")


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the CUDA toolkit, or the one that Triton brings."""
    import triton

    return shutil.which(name) or str(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def output_of(*command, **options) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, **options).stdout


def ninja(*arguments) -> str:
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return output_of("ninja", "-f", NINJA, *arguments, cwd=ROOT, env={**os.environ, "PATH": path})


class Usage(NamedTuple):
    registers: int
    shared: int  # bytes, without dynamic shared memory
    stack: int
    local: int


def short_names(mangled: list[str]) -> list[str]:
    """depthwise_conv_fwd_kernel<bf16, 7> of _ZN8fastconv4cuda..."""
    names = []
    for name in output_of("c++filt", *mangled).splitlines():
        name = re.sub(r"^void |fastconv::cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name)
        depth = 0
        for end, char in enumerate(name):
            depth += (char == "<") - (char == ">")
            if char == "(" and depth == 0:
                name = name[:end]
                break
        names.append(name)
    return names


def resources(binary: pathlib.Path) -> dict[tuple[str, str], Usage]:
    """(architecture, kernel) -> what it uses."""
    arch, found = "", {}
    lines = output_of(tool("cuobjdump"), "--dump-resource-usage", binary).splitlines()
    for line, following in itertools.pairwise(lines):
        arch = re.sub(r"arch = (\w+)", r"\1", line) if line.startswith("arch = ") else arch
        function = re.match(r"\s*Function (\S+):", line)
        if function:
            used = dict(re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", following))
            found[arch, function[1]] = Usage(*(int(used[name]) for name in ("REG", "SHARED", "STACK", "LOCAL")))
    short = dict(zip({name for _, name in found}, short_names(list({name for _, name in found}))))
    return {(arch, short[name]): usage for (arch, name), usage in found.items()}


def instructions(binary: pathlib.Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, kernel) -> 128-bit loads from and stores to global memory and tensor-core products, in the machine code."""
    path = f"{pathlib.Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    arch, name, counts = "", "", {}
    for line in output_of(tool("cuobjdump"), "-sass", binary, env={**os.environ, "PATH": path}).splitlines():
        header = re.match(r"arch = (\w+)|\s*Function : (\S+)", line)
        if header:
            arch, name = header[1] or arch, header[2] or ""
            if name:
                counts[arch, name] = [0, 0, 0]
        elif name:
            counts[arch, name][0] += bool(re.search(r"\b(LDG\.E|LDGSTS)\S*\.128\b", line))
            counts[arch, name][1] += bool(re.search(r"\bSTG\.E\S*\.128\b", line))
            counts[arch, name][2] += bool(re.search(r"\bHMMA\.16816\.F32", line))
    short = dict(zip({name for _, name in counts}, short_names(list({name for _, name in counts}))))
    return {(arch, short[name]): tuple(found) for (arch, name), found in counts.items()}


def nvcc_version() -> str:
    return re.search(r"V([\d.]+)", output_of(nvcc(), "--version"))[1]


def table(found: dict[tuple[str, str], Usage]) -> str:
    lines = ["# nvcc, then registers a thread and bytes of static shared memory a block; remake: see test_cuda_build.py", nvcc_version()]
    order = sorted(found, key=lambda key: (key[1], int(key[0].removeprefix("sm_"))))
    return "\n".join(
        [*lines, *(f"{arch:6} {found[arch, name].registers:3} {found[arch, name].shared:6} {name}" for arch, name in order), ""]
    )


@pytest.fixture(scope="module")
def found():
    assert LIBRARY.exists(), f"{_library.cuda_missing}: {REMEDY}"
    return resources(LIBRARY)


def test_it_is_built_from_these_sources_without_warnings():
    """make test builds with FASTCONV_WERROR=1: then compilation itself is the check, and here is its proof."""
    assert NINJA.exists(), f"the CUDA library was not built in this folder: {REMEDY}"
    assert "no work to do" in ninja("-n"), f"a source is newer than the library: {REMEDY}"
    assert (NINJA.parent / LIBRARY.name).read_bytes() == LIBRARY.read_bytes(), f"another build is installed: {REMEDY}"
    rules = NINJA.read_text()
    assert rules.count("-Werror=all-warnings") == 1 and "-Wall,-Wextra" in rules, f"built without FASTCONV_WERROR=1: {REMEDY}"
    objects = re.findall(r"^build (\S+): (\w+) (\S+)$", rules, re.M)
    assert sorted(source for *_, source in objects) == sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.c[up]*") if p.suffix != ".cuh"
    )
    seen = ninja("-t", "deps")
    for target, rule, _ in objects:
        (block,) = re.findall(rf"^{re.escape(target)}: .*\n((?: .*\n)+)", seen, re.M)
        headers = block.split()
        assert not [h for h in headers if "/torch/" in h] or rule == "glue", f"{target} sees a header of torch"
        assert not [h for h in headers if "cuda_runtime" in h] or rule == "cuda", f"{target} sees a header of the toolkit"


def flags() -> list[str]:
    """The command of the build for a kernel file, up to its architectures."""
    command = shlex.split(re.search(r"^rule cuda\n  command = (.+?) -MD ", NINJA.read_text(), re.M)[1])
    return [word for word in command if not word.startswith("-gencode")]


@pytest.mark.parametrize(
    "code, message",
    (
        ("__global__ void k(float* p) { *p = 1; }", ""),
        ("__global__ void k(float* p) { int unused; *p = 1; }", "unused"),
        ("int host(int unused) { return 1; }", "unused"),
        # an index that is known only at run time keeps the array out of the registers
        ("__global__ void k(int* p, int n) { int a[64] = {}; for (int i = 0; i < n; ++i) ++a[p[i]]; p[0] = a[n]; }", "local memory"),
    ),
)
def test_a_warning_breaks_the_build(tmp_path, code, message):
    (tmp_path / "k.cu").write_text(code)
    command = [*flags(), "-gencode=arch=compute_90,code=sm_90", "-c", "k.cu", "-o", "k.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode == 0) == (message == "") and message in (result.stdout + result.stderr).lower(), result.stderr


def test_architectures(found):
    known = [int(a) for a in re.findall(r"compute_(\d+)\b", output_of(nvcc(), "--list-gpu-arch"))]
    assert {arch for arch, _ in found} == {"sm_80", "sm_90", f"sm_{max(known)}"}
    ptx = set(re.findall(r"\.(sm_\d+)\.ptx", output_of(tool("cuobjdump"), "--list-ptx", LIBRARY)))
    assert ptx == {"sm_90", f"sm_{max(known)}"}  # for GPUs between Hopper and the newest, and for those after it


def test_no_kernel_uses_local_memory(found):
    assert len(found) > 10
    assert not {key: usage for key, usage in found.items() if usage.stack or usage.local}


def test_resources_do_not_grow_in_silence(found):
    committed = TABLE.read_text().splitlines()
    if committed[1] != nvcc_version():
        pytest.skip(f"the table is of nvcc {committed[1]}")
    difference = sorted(set(table(found).splitlines()) ^ set(committed))
    assert not difference, "if that is wanted, run python tests/test_cuda_build.py and commit:\n" + "\n".join(difference)


def test_global_memory_is_reached_in_16_bytes_and_tensor_cores_where_the_name_says():
    counts = instructions(LIBRARY)
    assert counts.keys() == resources(LIBRARY).keys()
    for (arch, name), (loads, stores, products) in counts.items():
        assert (products > 0) == ("_mma_" in name), f"{name} on {arch}: {products} HMMA"
        if not any(re.fullmatch(pattern, name) for pattern in SCALAR):
            assert loads, f"{name} on {arch}: no LDG.128"
            assert (stores > 0) != any(re.fullmatch(pattern, name) for pattern in SCALAR_STORES), f"{name} on {arch}: {stores} STG.128"
    names = {name for _, name in counts}
    for pattern in (*SCALAR, *SCALAR_STORES):
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_kernel_files_include_no_torch():
    """Nor anything else that the simulator has no twin of."""
    paths = [p for p in (ROOT / "csrc/cuda").iterdir() if p.suffix in (".cu", ".cuh", ".h") and p.name != "glue.h"]
    assert len(paths) > 6
    for path in paths:
        for name in re.findall(r'#include\s+[<"]([^>"]+)', path.read_text()):
            beside = any((folder / name).exists() for folder in (path.parent, ROOT / "tests/simt"))
            assert beside or name in ("algorithm", "cstddef", "cstdint", "cuda_runtime.h", "type_traits"), f"{path.name} includes {name}"


def test_it_loads_and_doctor_says_what_it_is():
    assert _library.cuda_missing == ""
    line = doctor.facts()["CUDA kernels"]
    assert line.startswith(f"built by nvcc {nvcc_version()} for sm_80, ") and "sm_90" in line and "compute_90" in line
    for op in (op for op, backends in _registry.OPS.items() if "cuda" in backends):
        for name in _registry.hub(op).SCHEMAS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv::{name}", "CUDA"), name
        assert doctor.missing(op, "cuda") == ("" if torch.cuda.is_available() else "torch sees no GPU")


def python(code: str, **environment) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTCONV_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=300
    )


def test_on_a_torch_without_cuda_doctor_says_why():
    result = python("import torch; torch.version.cuda = None\nfrom fastconv import doctor; doctor.main()")
    assert result.returncode == 0, result.stderr
    assert f"the CUDA library needs a CUDA build of torch, this is torch {torch.__version__}" in result.stdout


SETUP = """
import os, runpy, setuptools
setuptools.setup = lambda ext_modules, cmdclass, **_: print(*(e.name for e in ext_modules), *dict(ext_modules[-1].define_macros).values())
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize(
    "reason, environment, before",
    (
        ("FASTCONV_CUDA=0", {"FASTCONV_CUDA": "0"}, ""),
        ("lacks", {}, "import os, torch; torch.__file__ = os.path.abspath('x/__init__.py')"),
        ("nvcc was not found in CUDA_HOME", {"CUDA_HOME": "empty"}, ""),
        ("is not a CUDA build", {}, "import torch; torch.version.cuda = None"),
        ("nvcc does not build a kernel here: nvcc fatal: c++20", {"CUDA_HOME": "old"}, ""),
        ("", {"TORCH_CUDA_ARCH_LIST": "7.5"}, ""),
    ),
)
def test_the_build_says_why_it_leaves_the_library_out(tmp_path, reason, environment, before):
    (tmp_path / "old/bin").mkdir(parents=True)
    (tmp_path / "old/bin/nvcc").write_text("#!/bin/sh\necho 'nvcc fatal: c++20' >&2\nexit 1\n")
    (tmp_path / "old/bin/nvcc").chmod(0o755)
    if "CUDA_HOME" in environment:
        environment = {"CUDA_HOME": str(tmp_path / environment["CUDA_HOME"])}
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = python(before + SETUP, PATH=path, **environment)
    assert result.returncode == 0, result.stderr
    assert reason in result.stdout
    if not reason:
        assert "fastconv._ops_cuda" in result.stdout and "for sm_80, sm_90, " in result.stdout
        return
    assert "fastconv._ops_cuda" not in result.stdout
    assert re.search(rf"^fastconv: installing without the CUDA C\+\+ kernels: .*{re.escape(reason)}", result.stderr, re.M)
    if "CUDA_HOME" in environment:
        result = python(SETUP, PATH=path, FASTCONV_CUDA="1", **environment)
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 1 and last.startswith("fastconv: FASTCONV_CUDA=1, but ") and reason in last


if __name__ == "__main__":
    TABLE.write_text(table(resources(LIBRARY)))
