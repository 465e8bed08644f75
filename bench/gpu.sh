#!/usr/bin/env bash
# Tests and measures this project on a machine with an NVIDIA GPU and nothing to fetch from.
#
# Here, where there is an index of packages, nvcc and an interpreter of that machine's version:
#
#   bench/gpu.sh --pack --python python3.12      # fills .gpu, which goes along with the checkout
#   bench/gpu.sh --dry-run                       # every step on CPU tensors, for this Python's wheel
#
# There, with nvcc and a python3 that has torch for CUDA:
#
#   bench/gpu.sh --output FOLDER                 # eight minutes at most
#   bench/gpu.sh --report FOLDER                 # the tables again, also of an unfinished run
#
# FOLDER gets steps.jsonl (how each step went), cases.jsonl (a line for each case and test when it has
# ended), log.txt (what the programs printed), report.json and report.txt. To keep a run, copy its
# report.json to bench/results/. No step needs another one but the first, which makes the package
# importable, and no candidate is timed whose results are wrong. bench/gpu/steps.py has the steps.
#
# PYTHON names another interpreter than python3. Exit status: 0 if no step failed.
set -euo pipefail
cd "$(dirname "$0")/.."
# The profiler and the sanitizer are often installed beside nvcc alone.
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
