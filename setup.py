"""Builds the op libraries (LibTorch stable ABI) for CPU and CUDA, and fastconv._C (pybind11, no torch).

FASTCONV_CPU=0 leaves all compiled parts out, FASTCONV_CPU=1 demands them; unset, they are built where a C++ compiler is
found. FASTCONV_CUDA=0 or 1 does the same for the CUDA library; unset, it is built where nvcc and a CUDA build of torch
are found, whether or not there is a GPU. CUDA_HOME says where nvcc is. MAX_JOBS caps the parallel compile jobs, and
FASTCONV_WERROR=1 turns the warnings of the CUDA library into errors.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from setuptools import Extension, setup

# Built with any torch >= 2.10, runs on any torch >= 2.10: only the stable ABI of that version is used.
TORCH_TARGET_VERSION = "0x020a000000000000"
COMPILE_ARGS = [
    *("-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),  # GCC's own AVX-512 headers set off the last two
]
CPU_SOURCES = [
    *("ops", "depthwise_conv", "depthwise_conv_norm", "residual_scale", "gelu_linear", "global_response_norm"),
    *("squeeze_excite", "grouped_conv", "window_attention", "linear"),
    *("kernels_default", "kernels_avx2", "kernels_avx512"),
]
CUDA_BUILD = "build/cuda"  # not a temporary folder of pip's: objects are reused
CUDA_LIBRARY = "_ops_cuda.so"
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
CUDA_WERROR = ["-Werror=all-warnings", "-Xcompiler=-Werror", "-Xptxas=-warn-spills,-warn-lmem-usage"]


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


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiler_version() -> str:
    return output_of(*os.environ.get("CXX", "c++").split(), "--version").splitlines()[0]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


class Cuda:
    """The CUDA library: whether it can be built here (`missing` says why not), for what, and the build itself.

    nvcc sees no header of torch and the glue none of the toolkit. torch's own machinery for CUDA extensions would need
    both, and would ask a GPU or TORCH_CUDA_ARCH_LIST for the architectures.
    """

    def __init__(self, torch):
        self.torch, self.nvcc, self.version, self.codes = torch, find_nvcc(), "", []
        cxx = os.environ.get("CXX", "").split()
        self.host = ["-ccbin", cxx[0]] if len(cxx) == 1 else []
        self.link = [*self.host, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        wanted = os.environ.get("FASTCONV_CUDA", "")
        reason = "FASTCONV_CUDA=0" if wanted == "0" else self._why_not()
        self.missing = f"{reason} (change that, then reinstall fastconv)" if reason else ""
        if reason and wanted == "1":
            sys.exit(f"fastconv: FASTCONV_CUDA=1, but {reason}")

    def _why_not(self) -> str:
        version = f"torch {self.torch.__version__}"
        if self.torch.version.cuda is None:
            return f"{version} is not a CUDA build"
        if self.nvcc is None:
            return f"nvcc was not found {'in CUDA_HOME' if os.environ.get('CUDA_HOME') else '(it comes with the CUDA toolkit)'}"
        if shutil.which("ninja") is None:
            return "ninja was not found (pip install ninja)"
        for name in ("include/torch/csrc/stable/library.h", "include/torch/csrc/stable/accelerator.h", "lib/libtorch_cuda.so"):
            if not os.path.exists(self._in_torch(name)):
                return f"{version} lacks {self._in_torch(name)}"
        with tempfile.TemporaryDirectory() as folder:  # headers, host compiler and libraries of the toolkit: are they whole?
            with open(f"{folder}/trial.cu", "w") as file:
                file.write("__global__ void trial() {}\n")
            command = [self.nvcc, *self.link, *CUDA_FLAGS, file.name, "-o", f"{folder}/trial.so"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                message = (result.stderr + result.stdout).strip().partition("\n")[0]
                return f"{self.nvcc} does not build a kernel here: {message}"
        self.version = re.search(r"release [\d.]+, V([\d.]+)", output_of(self.nvcc, "--version"))[1]
        newest = max(int(arch) for arch in re.findall(r"compute_(\d+)\b", output_of(self.nvcc, "--list-gpu-arch")))
        # Machine code for Ampere, Hopper and the newest; PTX, from which a driver compiles for GPUs that come later, of
        # Hopper for those between and of the newest for those after it.
        self.codes = [f"sm_{arch}" for arch in sorted({80, 90, newest})] + [f"compute_{arch}" for arch in sorted({90, newest})]
        return ""

    def _in_torch(self, name: str) -> str:
        return os.path.join(os.path.dirname(self.torch.__file__), name)

    def facts(self) -> dict[str, str]:
        """For fastconv._C, and so for `fastconv doctor`."""
        return {"CUDA": f"nvcc {self.version} for {', '.join(self.codes)}" if not self.missing else "", "CUDA_MISSING": self.missing}

    def extension(self) -> Extension:
        return Extension("fastconv._ops_cuda", [], py_limited_api=True)

    def build(self, target: str) -> None:
        with open(_made(f"{CUDA_BUILD}/build.ninja"), "w") as file:
            file.write(self._ninja())
        command = ["ninja", "-f", file.name, "-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            sys.exit("fastconv: the CUDA library does not compile (see above); FASTCONV_CUDA=0 installs without it")
        shutil.copy(f"{CUDA_BUILD}/{CUDA_LIBRARY}", _made(target) + ".new")
        os.replace(target + ".new", target)  # never into a file that a process has mapped

    def _ninja(self) -> str:
        cxx = os.environ.get("CXX", "c++")
        werror = os.environ.get("FASTCONV_WERROR") == "1"
        gencode = [f"-gencode=arch={code.replace('sm', 'compute')},code={code}" for code in self.codes]
        glue = [*COMPILE_ARGS, "-fPIC", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA", "-Icsrc"]
        glue += ["-isystem", self._in_torch("include")]
        compile_one = ["-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
        torch_libraries = [f"-L{self._in_torch('lib')}", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10"]
        rules = {
            "cuda": [self.nvcc, *self.host, *CUDA_FLAGS, *gencode, *CUDA_WERROR * werror, *compile_one],
            "glue": [*cxx.split(), *glue, *["-Werror"] * werror, *compile_one],
            "link": [self.nvcc, *self.link, gencode[0], "$in", "-o", "$out", *torch_libraries],
        }
        lines = [f"builddir = {CUDA_BUILD}"]
        for name, command in rules.items():
            text = " ".join(word if word.startswith("$") else shlex.quote(word).replace("$", "$$") for word in command)
            lines += [f"rule {name}", f"  command = {text}", f"  description = {name} $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"] * (name != "link")
        sources = sorted(f"csrc/cuda/{name}" for name in os.listdir("csrc/cuda") if name.endswith((".cu", ".cpp")))
        objects = [f"{CUDA_BUILD}/{os.path.basename(source)}.o" for source in sources]
        for source, target in zip(sources, objects):
            lines.append(f"build {target}: {'cuda' if source.endswith('.cu') else 'glue'} {source}")
        return "\n".join([*lines, f"build {CUDA_BUILD}/{CUDA_LIBRARY}: link {' '.join(objects)}", ""])


def _made(path: str) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def extensions() -> tuple[list, dict]:
    reason = why_no_compiled_parts()
    if reason:
        if os.environ.get("FASTCONV_CUDA") == "1":
            sys.exit(f"fastconv: FASTCONV_CUDA=1, but the compiled parts are left out: {reason}")
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
    cuda = Cuda(torch)
    if cuda.missing:
        print(f"fastconv: installing without the CUDA C++ kernels: {cuda.missing}", file=sys.stderr)
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
    facts = {"COMPILER": compiler_version(), "TORCH_TARGET": "2.10", "TORCH_VERSION": torch.__version__, **cuda.facts()}
    info = Pybind11Extension(
        "fastconv._C",
        ["csrc/build_info.cpp"],
        include_dirs=["csrc"],
        depends=["csrc/geometry.h", "csrc/window_geometry.h"],
        define_macros=[(f"FASTCONV_{name}", json.dumps(value)) for name, value in facts.items()],
        cxx_std=20,
    )

    class Build(BuildExtension):
        """Gives the op libraries names that do not depend on the Python version, and builds the CUDA one."""

        def get_ext_filename(self, name):
            filename, stem = super().get_ext_filename(name), name.rpartition(".")[2]
            return os.path.join(os.path.dirname(filename), f"{stem}.so") if stem.startswith("_ops_") else filename

        def build_extension(self, ext):
            if ext.name == "fastconv._ops_cuda":
                return cuda.build(self.get_ext_fullpath(ext.name))
            self.force = ext.name == "fastconv._C"  # its macros may have changed, which setuptools does not see
            return super().build_extension(ext)

        def run(self):
            if cuda.missing:  # one from an earlier build must not be taken for this one's
                for folder in ["fastconv"] * self.inplace + [os.path.join(self.build_lib, "fastconv")]:
                    if os.path.exists(f"{folder}/{CUDA_LIBRARY}"):
                        os.remove(f"{folder}/{CUDA_LIBRARY}")
            super().run()

    libraries = [ops, info] if cuda.missing else [ops, cuda.extension(), info]
    return libraries, {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


ext_modules, cmdclass = extensions()
setup(license="Apache-2.0", ext_modules=ext_modules, cmdclass=cmdclass)
