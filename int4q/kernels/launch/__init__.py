"""Compiling, planning and launching GPU kernels: what the Triton and CUDA C++ rooms share."""
