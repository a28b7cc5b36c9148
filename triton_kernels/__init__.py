"""Triton kernels, one module an op."""
