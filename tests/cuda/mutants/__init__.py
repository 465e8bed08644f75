"""Bugs to plant in the CUDA kernels, one at a time, and what has to find each of them."""
