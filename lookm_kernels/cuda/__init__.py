"""CUDA C++ kernels: the launchers of csrc/ for tensors. They take checked arguments and hold no logic."""
