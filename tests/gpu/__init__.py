"""What `make gpu-check` runs on a GPU (benchmarks/gpu_check.py), one process a step: `python -m gpu.<module> ...`.

- probes.py: every wrapper of csrc/cuda/portable.cuh on the hardware and in the simulator, the same bits from both
- checks.py: the op contract, repeatability, streams, huge tensors, models; CUDA graphs
- sanitizer.py: the kernels under compute-sanitizer

Exit status 0: holds. 1: does not. RECORDED: it could not be tried here, and the output says why.
"""

RECORDED = 77
