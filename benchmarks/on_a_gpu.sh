#!/usr/bin/env bash
# What to run on a borrowed GPU machine: the tests that need a GPU, the kernel benchmark, whole training steps.
#
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh                  tests and kernels, in at most ten minutes
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh tests            one of them: tests, benchmark
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh benchmark --benchmark linear_logprobs --shape llama3-8b-8k
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh train_step       DPO and PPO steps of real shapes, in at most ten minutes
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh train_step --case '8B, NF4, 12 GB card'
#
# It needs a python3 with torch 2.11 (CUDA 13) and triton 3.6 or newer, click, rich, matplotlib and pytest; nothing is
# installed or fetched, and this repository need not be. train_step also needs transformers, peft, trl, datasets and
# bitsandbytes. Peers (trl, liger-kernel, cut-cross-entropy) that are not on PYTHONPATH stand in the tables with the
# reason. Where there is no .git, say ONECARD_COMMIT=<hash>.
#
# Into OUT (default: benchmarks/results/<device>): tests.txt, benchmark.txt, train_step.txt, and kernels-*.json and
# train-step-*.json, which are written after every case, so that a run that is cut off leaves what it had. Tables and
# plots are made from them afterwards, anywhere:
#   python -m benchmarks.render kernels-*.json
#   python -m benchmarks.train_step.render train-step-*.json
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels:engine:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=120
PYTHON=${PYTHON:-python3}
TEST_SECONDS=${TEST_SECONDS:-120}
BENCHMARK_SECONDS=${BENCHMARK_SECONDS:-465}
TRAIN_STEP_SECONDS=${TRAIN_STEP_SECONDS:-570}
PART=both
case "${1:-}" in tests | benchmark | both | train_step) PART=$1; shift ;; esac
if [ -z "${OUT:-}" ]; then
  OUT=$("$PYTHON" -c 'import torch; from benchmarks import records; print(records.ROOT / "benchmarks/results" / records.machine(torch.device("cuda"))[1])') || exit 2
fi
mkdir -p "$OUT"
status=0

limited() { # seconds, log, command...
  local seconds=$1 log=$2 ended
  shift 2
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee "$OUT/$log"
  ended=${PIPESTATUS[0]}
  case $ended in
    0) return ;;
    124 | 137) echo "cut off after $seconds s" | tee -a "$OUT/$log" ;;
  esac
  status=$ended
}

if [ "$PART" = train_step ]; then # no case is begun when two thirds of the time are over
  limited "$TRAIN_STEP_SECONDS" train_step.txt "$PYTHON" -m benchmarks.train_step --device cuda --data-only \
    --minutes $((TRAIN_STEP_SECONDS / 90)) --out "$OUT" "$@"
  exit "$status"
fi
if [ "$PART" != benchmark ]; then
  limited "$TEST_SECONDS" tests.txt "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu
fi
if [ "$PART" != tests ]; then
  limited "$BENCHMARK_SECONDS" benchmark.txt "$PYTHON" -m benchmarks.kernels --device cuda --data-only --out "$OUT" "$@"
fi
exit "$status"
