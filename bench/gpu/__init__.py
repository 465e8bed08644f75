"""The run on a machine with an NVIDIA GPU and nothing to fetch from: see bench/gpu.sh.

Only the standard library is imported here, so that a missing package fails a step and not the run.
"""
