#!/usr/bin/env bash
# Builds, tests, sanitizes and measures simpo_ext on the GPU of this machine, in under ten minutes.
#
#   bench/gpu.sh [--dry-run] [--output FILE.json] [--wheels DIR]
#
#   --dry-run      walks every step with what a machine without a GPU has: the installed package, the
#                  CUDA kernels in the CPU emulator, CPU tensors of tiny sizes. Its times say nothing.
#   --output FILE  where the JSON goes; by default bench/results/gpu-NAME.json, after the GPU, or a
#                  temporary file if this is a dry run or nothing was measured.
#   --wheels DIR   wheels to install before the build, without an index: build requirements that the
#                  machine lacks (scikit-build-core, pybind11), or peers to measure.
#
# Needs nvcc, and a python3 that has torch with CUDA, the build requirements and what the tests use.
# Nothing is fetched. The build goes into a virtual environment of its own, with SIMPO_CUDA=ON, and
# with SIMPO_CUDA_ARCHS limited to the architecture of the first GPU: a wheel for others takes longer.
#
# A failed build or a failed test ends the run before anything is measured; any other failure is
# reported and the run goes on. Tools that are missing, or that the machine does not let work, are
# reported as skipped. Exit status: 0 if nothing failed. The JSON is written in every case.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

# Seconds: of each step at most, and of all of them together. A step may get less than its budget
# when those before it have used theirs up.
readonly TOTAL=580
readonly MACHINE=20 BUILD=130 TESTS=200 SANITIZER=45 STREAMS=30 MEASURE=120 LINEAR=75 SWEEP=30 DRAM=30

readonly SWEEP_SIZE="16384 128256"

usage() { sed -n '/^#   bench/,/^#   --dry-run/p' "$0" | sed -n '1s/^#  */usage: /p'; }

dry_run=false output="" wheels=""
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    --output) output=${2:?--output: expected a file} && shift ;;
    --wheels) wheels=$(realpath -e "${2:?--wheels: expected a folder}") && shift ;;
    -h | --help) usage && exit 0 ;;
    *) echo "unknown argument: $1" >&2 && usage >&2 && exit 2 ;;
  esac
  shift
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$work/steps.jsonl"
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The profiler and the sanitizer are often installed beside nvcc alone.
PATH=$PATH:/usr/local/cuda/bin
python=python3
failed=false

# ---- steps -----------------------------------------------------------------------------------

# step NAME BUDGET FUNCTION: runs the function, announces it, and records how it went. A function
# runs external programs through `limited`; it may return skip "REASON", which is no failure.
step() {
  local name=$1 budget=$2 function=$3 started=$SECONDS left=$((TOTAL - SECONDS)) rc status reason=""
  printf '\n==== [%4d s] %s (at most %d s)\n' "$SECONDS" "$name" "$((budget < left ? budget : left))"
  if ((left < 5)); then
    rc=1 reason="no time left"
  else
    deadline=$((SECONDS + (budget < left ? budget : left)))
    rm -f "$work/skipped"
    "$function" 2>&1 | tee "$work/log"
    rc=${PIPESTATUS[0]}
    if ((rc != 0 && SECONDS >= deadline)); then reason="out of time"; fi
  fi
  if ((rc == 0)) && [[ -e $work/skipped ]]; then
    status=skipped reason=$(<"$work/skipped")
  elif ((rc == 0)); then
    status=ok
  else
    status=failed failed=true
    reason=${reason:-"exit status $rc"}
  fi
  printf -- '---- %s: %s%s\n' "$name" "$status" "${reason:+: $reason}"
  printf '{"name": "%s", "status": "%s", "reason": "%s", "seconds": %d, "budget": %d}\n' \
    "$name" "$status" "$reason" "$((SECONDS - started))" "$budget" >>"$work/steps.jsonl"
  [[ $status != failed ]]
}

# Runs a program for as long as the step has left.
limited() {
  local left=$((deadline - SECONDS))
  ((left > 0)) || return 124
  timeout --kill-after=5 "$left" "$@"
}

# The compute capability of the first GPU, as in 90.
architecture() { nvidia-smi --id=0 --query-gpu=compute_cap --format=csv,noheader | tr -d .; }

# REASON is printed into JSON as it is: no quotes, no backslashes.
skip() {
  echo "$1"
  printf '%s' "$1" >"$work/skipped"
}

finish() {
  python3 -m bench.report "$work" ${output:+--output "$output"} $($dry_run && echo --dry-run) ||
    failed=true
  printf '\n%s after %d s\n' ""$($failed && echo FAILED || echo done)"" "$SECONDS"
  $failed && exit 1
  exit 0
}

# ---- what the steps do -----------------------------------------------------------------------

report_machine() {
  limited python3 -m bench.machine "$work/machine.json" || return
  if $dry_run; then
    command -v nvcc || echo "no nvcc"
    return 0
  fi
  command -v nvcc || { echo "no nvcc" && return 1; }
  limited nvidia-smi || return
  limited python3 -c 'import torch; torch.cuda.is_available() or exit("torch finds no GPU")'
}

build() {
  if $dry_run; then
    echo "dry run: the installed package instead of a build"
  else
    limited python3 -m venv --system-site-packages "$work/venv" || return
    # Where python3 is itself one of a virtual environment, "system" is not the one that has torch.
    local site
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    python3 -c 'import sysconfig
print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
      >"$site/parent_environment.pth" || return
    if [[ -n $wheels ]]; then
      limited "$python" -m pip install --no-index --no-deps --find-links "$wheels" \
        "$wheels"/*.whl || return
    fi
    local archs
    archs=$(architecture) || return
    SIMPO_CUDA=ON SIMPO_CUDA_ARCHS=$archs limited "$python" -m pip install \
      --no-index --no-deps --no-build-isolation . || return
    # An editable install among the system's packages would come before this build.
    limited "$python" -c 'import sys, simpo_ext
origin = simpo_ext._C.__file__
origin.startswith(sys.prefix) or sys.exit(f"expected the build in {sys.prefix}, got {origin}")' ||
      return
  fi
  limited "$python" -m simpo_ext info &&
    limited "$python" -c 'import json, simpo_ext; print(json.dumps(simpo_ext.build_info()))' \
      >"$work/build.json"
}

run_tests() {
  if $dry_run; then
    limited "$python" -m pytest -q --kernels=emulated tests/test_token_logps.py
    return
  fi
  local parallel=()
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
  export FAIL_WITHOUT_CUDA=1
  limited "$python" -m pytest -q tests/test_cuda.py tests/test_cuda_linear.py tests/test_cuda_vocab.py &&
    limited "$python" -m pytest -q --kernels=cuda "${parallel[@]}"
}

sanitize() { # TOOL
  if $dry_run; then
    echo "dry run: the sanitizer's program on CPU tensors, without compute-sanitizer"
    limited "$python" -m bench.sanitize --device cpu
    return
  fi
  command -v compute-sanitizer || {
    skip "there is no compute-sanitizer"
    return
  }
  local rc
  # Without torch's caching allocator each tensor is an allocation of its own, whose end is checked.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m bench.sanitize 2>&1 | tee "$work/sanitizer.log"
  rc=${PIPESTATUS[0]}
  if ((rc != 0)) && grep -qiE 'device not supported|failed to initialize' "$work/sanitizer.log"; then
    skip "compute-sanitizer does not work on this machine"
    return
  fi
  return "$rc"
}

memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

run_stream_tests() {
  local selected=(tests/test_cuda.py tests/test_cuda_linear.py -m gpu -k "graph or stream")
  if $dry_run; then
    if [[ -e tests/test_cuda.py ]]; then
      limited "$python" -m pytest -q --collect-only "${selected[@]}" || return
    fi
    skip "dry run: needs a GPU"
    return
  fi
  FAIL_WITHOUT_CUDA=1 limited "$python" -m pytest -q "${selected[@]}"
}

measure() {
  local options=()
  if $dry_run; then
    echo "dry run: cpu"
    options=(--device cpu --rounds 2 --sizes 64x1024 32x4096)
  fi
  limited "$python" -m bench.bench_token_logps --json "$work/measurements.json" "${options[@]}"
}

measure_linear() {
  local options=()
  if $dry_run; then
    echo "dry run: cpu"
    options=(--device cpu --rounds 1 --size 128x64x1024 --sequences 4)
    local -x OMP_NUM_THREADS=1 # so little work is done before other threads are awake
  fi
  limited "$python" -m bench.linear_gpu --json "$work/linear.json" "${options[@]}"
}

sweep() {
  local compile=(nvcc -std=c++17 -O3 --expt-relaxed-constexpr -I csrc bench/cuda/sweep_token_logps.cu)
  if $dry_run; then
    command -v nvcc || {
      skip "dry run: there is no nvcc"
      return
    }
    limited "${compile[@]}" -arch=sm_90 -c -o "$work/sweep.o" || return
    skip "dry run: compiled and not run"
    return
  fi
  limited "${compile[@]}" -arch="sm_$(architecture)" -o "$work/sweep" || return
  # shellcheck disable=SC2086  # two numbers
  limited "$work/sweep" $SWEEP_SIZE | tee "$work/sweep.jsonl"
  return "${PIPESTATUS[0]}"
}

read_dram_throughput() {
  if $dry_run; then
    skip "dry run: no GPU for ncu"
    return
  fi
  limited "$python" -m bench.dram_throughput "$work/dram.json" || return
  if grep -q '"available": false' "$work/dram.json"; then
    skip "ncu read nothing; the reason stands under dram"
  fi
}

# ---- the run ---------------------------------------------------------------------------------

$dry_run && echo "dry run: nothing here measures a GPU"
step "machine" $MACHINE report_machine || {
  $dry_run || echo "no usable GPU or no nvcc: --dry-run does what can be done without" >&2
  finish
}
$dry_run || python=$work/venv/bin/python
step "build" $BUILD build || finish
$dry_run || PATH=$work/venv/bin:$PATH
step "tests" $TESTS run_tests || finish
step "memcheck" $SANITIZER memcheck
step "racecheck" $SANITIZER racecheck
step "CUDA graphs and streams" $STREAMS run_stream_tests
step "measurements" $MEASURE measure
step "linear front end" $LINEAR measure_linear
step "sweep" $SWEEP sweep
step "DRAM throughput" $DRAM read_dram_throughput
finish
