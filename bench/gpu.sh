#!/usr/bin/env bash
# Tests and measures this project on a machine that has an NVIDIA GPU and can fetch nothing.
#
# First, on a machine with a package index, nvcc, and an interpreter of the GPU machine's version:
#
#   bench/gpu.sh --pack --python python3.12    # fills .gpu; copy it along with the checkout
#   bench/gpu.sh --dry-run                     # every step on CPU tensors, if the wheel fits here
#
# Then, on the GPU machine, with nvcc and a python3 that has torch for CUDA:
#
#   bench/gpu.sh --output FOLDER               # takes eight minutes at most
#   bench/gpu.sh --report FOLDER               # prints the tables again, even of an unfinished run
#
# FOLDER receives steps.jsonl (how each step went), cases.jsonl (a line for each case and test,
# written when it ends), log.txt (what the programs printed), report.json and report.txt. To keep a
# run, copy its report.json to bench/results/. Every step depends only on the first one, which makes
# the package importable. A candidate with wrong results is not timed. bench/gpu/steps.py has the
# steps.
#
# PYTHON names an interpreter other than python3. The exit status is 0 if no step failed.
set -euo pipefail
cd "$(dirname "$0")/.."
# The profiler and the sanitizer are often found only beside nvcc.
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
