"""Triton kernels: the backend of NVIDIA and AMD GPUs. Launchers take checked arguments and hold no logic."""
