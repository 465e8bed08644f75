"""The PTX of the CUDA kernels, executed on the CPU and compared with float64. See README.md."""
