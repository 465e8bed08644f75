"""The run on a machine that has an NVIDIA GPU and can fetch nothing: see bench/gpu.sh.

The program that runs the steps imports only the standard library, so that a missing package fails
one step and not the whole run.
"""
