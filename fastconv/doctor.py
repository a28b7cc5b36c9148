"""What this installation can run, and why not more: `fastconv doctor`, or `python -m fastconv.doctor` without the extras."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import fastconv
from fastconv import _library
from fastconv.ops import _registry

_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # the device type that a backend's kernels run on


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """Versions, devices and what was built."""
    found = {"fastconv": fastconv.__version__, "Python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda}, ROCm {torch.version.hip})"
    found |= {package: _version(package) for package in ("triton", "timm", "torchvision", "transformers")}
    if torch.cuda.is_available():
        driver = torch._C._cuda_getDriverVersion()
        found["CUDA driver"] = f"supports CUDA {driver // 1000}.{driver % 1000 // 10}"
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
    else:
        found["GPU"] = "torch sees none"
    found["CPU kernels"] = _library.cpu_missing or f"built, using {torch.ops.fastconv.cpu_capability()}; {torch.get_num_threads()} threads"
    built = _library.build_info()
    found["CUDA kernels"] = _library.cuda_missing or f"built by {built.get('cuda', 'an unknown compiler')}"
    if built:
        found["built with"] = ", ".join(f"{name} {value}" for name, value in built.items() if not name.startswith("cuda"))
    return found


def missing(op: str, backend: str) -> str:
    """Why `backend` cannot run `op` on this machine, or ""."""
    if backend == "eager":
        return ""
    device = _DEVICE[backend]
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.init()  # only then is the GPU itself looked at
    reason = _registry.missing(op, backend, device, ())
    if not reason and device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return reason


def main() -> None:
    width = max(map(len, facts()))
    for name, value in facts().items():
        print(f"{name:<{width}}  {value}")
    width = max(map(len, _registry.OPS))
    print(f"\n{'op':<{width}}  backend  ")
    for op in _registry.OPS:
        for backend in _registry.BACKENDS:
            print(f"{op:<{width}}  {backend:<7}  {missing(op, backend) or 'ok'}")


if __name__ == "__main__":
    main()
