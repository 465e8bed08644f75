"""The project's CUDA kernels, launched in the interpreter by their own host code."""
