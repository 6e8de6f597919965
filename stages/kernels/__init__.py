"""Triton kernels for the training step: imported only where tensors stand on a CUDA device.

Each does what a few lines of torch do beside its caller (the CPU's path, and the test's oracle), in one pass over
memory.
"""
