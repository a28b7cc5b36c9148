"""CUDA kernels on the CPU: a simulator for the kernels of csrc/cuda, and the ops that run on it.

twin.h      portable.cuh's names, on simt.h
simt.h      what the engine offers to them
engine.cpp, threads.cpp, block.h, fiber.h   launches and blocks; what threads call; stacks and the sanitizers' notices
counters.*  sectors, wavefronts, mma and ldmatrix of the accesses that go through portable.cuh
build.py    compiles kernels, engine and glue: plain, with ASan and UBSan, with TSan; also with seeded bugs
control.py  settings, messages and counters of a loaded library
hub.py      lets fastconv.ops run the simulated kernels as backend "cuda" on CPU tensors
check.py    the op contract in a process of its own, for the sanitizers and the seeded bugs
probes.cu   small kernels that the engine's own tests run

    with simulated() as simulator, simulator.settings(order="reverse"):
        check_op(CASES["depthwise_conv"][0], torch.bfloat16, "cuda")

It sees: a value read before it is written (shared memory and the targets of cp.async hold NaN), accesses outside of shared
memory or misaligned, barriers and collectives that do not match, what cannot be launched; with ASan accesses outside of
tensors; with TSan two threads on one address without a barrier between them, also of different blocks. The blocks of a cluster
run together. It does not see: the PTX itself, approximate instructions to the last bit, caches, the order of memory that atomics
and fences give, blocks that wait for each other outside of a cluster, and accesses that bypass portable.cuh, which
test_simt_lint.py refuses. The layouts of mma and ldmatrix are those of the PTX manual, not of hardware.
"""
