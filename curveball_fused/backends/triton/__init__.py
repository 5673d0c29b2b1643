"""The operators in Triton, for NVIDIA GPUs."""
