"""The rule of csrc/cuda/portable.cuh: kernel files reach hardware and memory through its names alone."""

import pathlib
import re

import pytest

CUDA = pathlib.Path(__file__).parent.parent / "csrc" / "cuda"
FILES = sorted(path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh") and path.name != "portable.cuh")
HEADERS = sorted(CUDA.glob("*_kernel.h"))
HARDWARE = re.compile(
    r"\basm\b|<<<|\b__(?:shared__|sync\w*|shfl\w*|ldg|stg|ballot\w*|threadfence\w*|cvta\w*|nv_\w+|half2?|pipeline\w*|constant__)\b"
    r"|\batomic[A-Z]\w*|\bcuda[A-Z]\w*\b(?<!cudaStream_t)|\bnvcuda\b|\bcooperative_groups\b|\bvolatile\b|\bextern\b"
)
MEMORY = r"load_global|store_global|load_shared|store_shared|copy_async|ldmatrix|atomic_add"
ALLOWED_INCLUDES = re.compile(r'"(?:[\w]+\.(?:cuh|h)|\.\./geometry\.h)"')


def code_of(text: str) -> str:
    """Without comments and strings, lines kept."""
    return re.sub(r'//[^\n]*|"[^"\n]*"|/\*.*?\*/', lambda m: "\n" * m.group().count("\n"), text, flags=re.S)


def pointers_of(text: str) -> set[str]:
    """Names declared as pointers (clang-format puts the star to the type): parameters, members, variables, shared memory."""
    declared = re.findall(r"[\w>]\*\s*(?:const\b|__restrict__|\s)*(\w+)\s*[=,;){]|(?<=[\w>,]) \*(\w+)\s*(?=[,;])", text)
    shared = re.findall(r"FC_SHARED\([^,]+,\s*(\w+)|FC_DYNAMIC_SHARED\((\w+)", text)
    return {name for pair in (*declared, *shared) for name in pair if name}


def violations(text: str, members: frozenset[str] = frozenset()) -> list[str]:
    """Lines of a kernel file that break the rule; `members`: pointers in structs of the headers."""
    found = [f"include {name}" for name in re.findall(r"^\s*#include\s*(\S+)", text, re.M) if not ALLOWED_INCLUDES.fullmatch(name)]
    number = 0
    for part in re.split(r"\n(?=[^\s}])", code_of(text)):  # a definition: from one line without indentation to the next
        names = "|".join(pointers_of(part)) or "(?!)"
        pointer = rf"(?:(?:\w+\.)+(?:{'|'.join(members) or '(?!)'})|(?:{names}))\b"
        raw = re.compile(
            rf"(?<![\w.]){pointer}\s*\["  # p[i], s.p[i]
            rf"|(?:^|[^\w>]|\breturn )\*\(*{pointer}"  # *p, *(p + i)
            r"|(?:^|[^\w>]|\breturn )\*\(*\w+_cast<"  # *reinterpret_cast<...>(p)
            r"|_cast<[^;()]*\*>\([^;()]*\)\s*\["  # reinterpret_cast<T*>(p)[i]
            r"|(?<!\bthis)->"
        )
        for line in part.split("\n"):
            number += 1
            found += [f"line {number}: {match.group().strip()}: {line.strip()}" for rule in (HARDWARE, raw) if (match := rule.search(line))]
    return found


DECLARED = frozenset().union(*(pointers_of(code_of(path.read_text())) for path in [*HEADERS, CUDA / "params.h"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_use_the_portable_names_alone(path):
    assert not violations(path.read_text(), DECLARED)


def test_every_kernel_file_is_read():
    assert {"residual_scale_kernel.cu", "depthwise_conv_kernel.cu", "array.cuh"} <= {path.name for path in FILES}
    assert {"data", "partial", "norm_partial", "mean", "rstd"} <= DECLARED
    assert all(re.search(rf"\b(?:{MEMORY}|stage_window|stage_input)\b", path.read_text()) for path in FILES if path.suffix == ".cu")


@pytest.mark.parametrize(
    "line",
    (
        "x[threadIdx.x] = 1;",
        "float v = tile[3];",
        "*out = 2.0f;",
        "sum += *(x + 1);",
        "sum = sum + *x;",
        "return *x;",
        "p.partial[0] = 1;",
        "const float m = p.mean[pixel];",
        "auto four = *reinterpret_cast<const float4*>(x);",
        "float v = reinterpret_cast<const float*>(raw)[i];",
        "v = raw[0];",
        "sum += x->value;",
        "__syncthreads();",
        "__shared__ float more[32];",
        'asm volatile("bar.sync 0;");',
        "v += __shfl_xor_sync(~0u, v, 1);",
        "atomicAdd(out, v);",
        "kernel<<<1, 32>>>();",
        "cudaDeviceSynchronize();",
        "const float v = __ldg(x);",
        "__nv_bfloat16 h;",
        "#include <cuda_bf16.h>",
        "#include <torch/torch.h>",
    ),
)
def test_the_rule_finds(line):
    kernel = """#include "portable.cuh"
__global__ void k(const float* x, float* const out, Params p) {
  FC_SHARED(float, tile, 32);
  FC_DYNAMIC_SHARED(raw);
  float acc[4] = {};
  // x[0] and *x in a comment
  const float* from = x + 2 * threadIdx.x;
  acc[0] = load_global<float>(from) * acc[1] + load_shared<float>(tile + 3);
  store_global(out + p.count * acc[2], acc[0], p.partial && from);
  %s
}
"""
    assert not violations(kernel % "", DECLARED)
    assert violations(kernel % line, DECLARED), line
