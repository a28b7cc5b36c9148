"""Builds the CPU op library (LibTorch stable ABI) and fastconv._C (pybind11, no torch).

FASTCONV_CPU=0 leaves the compiled parts out, FASTCONV_CPU=1 demands them; unset, they are built where a C++ compiler is
found. MAX_JOBS caps the parallel compile jobs.
"""

import os
import platform
import shutil
import subprocess
import sys

from setuptools import setup

# Built with any torch >= 2.10, runs on any torch >= 2.10: only the stable ABI of that version is used.
TORCH_TARGET_VERSION = "0x020a000000000000"
COMPILE_ARGS = [
    *("-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),  # GCC's own AVX-512 headers set off the last two
]
CPU_SOURCES = [
    *("ops", "depthwise_conv", "depthwise_conv_norm", "residual_scale"),
    *("kernels_default", "kernels_avx2", "kernels_avx512"),
]


def why_no_compiled_parts() -> str:
    wanted = os.environ.get("FASTCONV_CPU", "")
    if wanted == "0":
        return "FASTCONV_CPU=0"
    compiler = os.environ.get("CXX", "c++").split()[0]
    reason = ""
    if sys.platform == "win32":
        reason = "the kernels need GCC's or Clang's vector extensions, which MSVC lacks"
    elif shutil.which(compiler) is None:
        reason = f"no C++ compiler ({compiler}) was found"
    if reason and wanted == "1":
        sys.exit(f"fastconv: FASTCONV_CPU=1, but {reason}")
    return reason


def compiler_version() -> str:
    compiler = os.environ.get("CXX", "c++").split()
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def extensions() -> tuple[list, dict]:
    reason = why_no_compiled_parts()
    if reason:
        print(f"fastconv: installing without compiled kernels: {reason}", file=sys.stderr)
        return [], {}
    try:
        import torch
        from pybind11.setup_helpers import Pybind11Extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"fastconv: the build needs torch, pybind11 and ninja ({error}). With --no-build-isolation install them first "
            "(pip install torch pybind11 ninja), or leave that flag out, or set FASTCONV_CPU=0 to install without compiled kernels."
        )
    os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
    rpath = ["-Wl,-undefined,dynamic_lookup"] if platform.system() == "Darwin" else []
    ops = CppExtension(
        "fastconv._ops_cpu",
        [f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES],
        include_dirs=[os.path.abspath("csrc")],
        depends=["csrc/check.h", "csrc/geometry.h", *(f"csrc/cpu/{n}" for n in os.listdir("csrc/cpu") if n.endswith(".h"))],
        extra_compile_args=[*COMPILE_ARGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
        extra_link_args=rpath,
        py_limited_api=True,  # no Python in the library: torch.ops.load_library opens it
    )
    facts = {"COMPILER": compiler_version(), "TORCH_TARGET": "2.10", "TORCH_VERSION": torch.__version__}
    info = Pybind11Extension(
        "fastconv._C",
        ["csrc/build_info.cpp"],
        include_dirs=["csrc"],
        depends=["csrc/geometry.h"],
        define_macros=[(f"FASTCONV_{name}", f'"{value}"') for name, value in facts.items()],
        cxx_std=20,
    )

    class Build(BuildExtension):
        """Gives the op library a name that does not depend on the Python version."""

        def get_ext_filename(self, name):
            filename = super().get_ext_filename(name)
            return os.path.join(os.path.dirname(filename), "_ops_cpu.so") if name.endswith("_ops_cpu") else filename

    return [ops, info], {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


ext_modules, cmdclass = extensions()
setup(license="Apache-2.0", ext_modules=ext_modules, cmdclass=cmdclass)
