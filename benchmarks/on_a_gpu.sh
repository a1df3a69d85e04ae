#!/usr/bin/env bash
# What to run on a GPU machine, in commands of at most ten minutes:
#
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh first      tests, compute-sanitizer, rollouts: does everything run?
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh kernels    the kernels' tables, then tuning for as long as time allows
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh engine     whole steps, and a profile of a PPO iteration
#   OUT=/tmp/gpu benchmarks/on_a_gpu.sh train_step --case '8B, NF4, 12 GB card'      one part, with options of its own
#   OUT=/tmp/dry benchmarks/on_a_gpu.sh rehearse   every part on a CPU, at tiny sizes: shows that it runs
#
# Parts: tests, sanitize, benchmark, tune, train_step, rollout, profile. Each has a log, and a time limit that
# TESTS_SECONDS=..., SANITIZE_SECONDS=... and so on change.
#
# It needs a python3 with torch 2.11 (CUDA 13) and triton 3.6 or newer, click, rich, matplotlib and pytest. It installs
# and downloads nothing; onecard itself is imported from this folder. `engine` also needs transformers, peft, trl,
# datasets and bitsandbytes, and so do some of the tests, which fail without them. Peers (trl, liger-kernel,
# cut-cross-entropy) that are not installed are in the tables with the reason. Without .git, set ONECARD_COMMIT=<hash>.
#
# OUT (default: benchmarks/results/<device>) gets a log of each part, and JSON files that are written after every case. So
# a run that is cut off keeps its finished cases. A whole run also writes its tables and plots; for others, on any machine:
#   python -m benchmarks.render *.json
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels:engine:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=120
PYTHON=${PYTHON:-python3}
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

minutes() { # seconds, share of them (0.7): minutes after which no further case begins
  "$PYTHON" -c "print($1 * ${2:-0.7} / 60)"
}

# A part's command, on a GPU and in a rehearsal.
gpu() { case $1 in
  tests) run=(pytest -q -p no:cacheprovider --durations=15 tests/gpu) ;;
  sanitize) run=(benchmarks.sanitize --minutes "$(minutes "$2" 0.9)") ;;
  benchmark) run=(benchmarks.kernels --device cuda) ;;
  tune) run=(benchmarks.tune --device cuda --minutes "$(minutes "$2" 0.9)") ;;
  train_step) run=(benchmarks.train_step --device cuda --minutes "$(minutes "$2")") ;;
  rollout) run=(benchmarks.rollout --device cuda --minutes "$(minutes "$2")") ;;
  profile) run=(benchmarks.profile_ppo --device cuda) ;;
esac; }
dry() { case $1 in
  tests) run=(pytest -q -p no:cacheprovider tests/gpu) ;;
  sanitize) run=(benchmarks.sanitize --dry) ;;
  benchmark) run=(benchmarks.kernels --quick --benchmark gae) ;;
  tune) run=(benchmarks.tune --dry) ;;
  train_step) run=(benchmarks.train_step --smoke) ;;
  rollout) run=(benchmarks.rollout --smoke) ;;
  profile) run=(benchmarks.profile_ppo --smoke) ;;
esac; }

part() { # gpu or dry, name, seconds, options...
  local kind=$1 name=$2 seconds=$3 limit out=(--out "$OUT")
  shift 3
  limit=${name^^}_SECONDS
  seconds=${!limit:-$seconds}
  "$kind" "$name" "$seconds"
  [ "$name" = tests ] && out=()
  echo "--- $name, at most $seconds s"
  limited "$seconds" "$name.txt" "$PYTHON" -m "${run[@]}" "${out[@]}" "$@"
}

WHAT=${1:-first}
shift || true
if [ "$WHAT" != rehearse ]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "on_a_gpu.sh: torch finds no GPU; to try the script without one: $0 rehearse" >&2
    exit 2
  }
fi
if [ -z "${OUT:-}" ]; then
  OUT=$("$PYTHON" -c 'import torch; from benchmarks import records; print(records.RESULTS / records.machine(torch.device("cuda"))[1])') || exit 2
fi
mkdir -p "$OUT"

case $WHAT in
  first)
    part gpu sanitize 240 >"$OUT/sanitize.log" & # in parallel: its kernels are small, and the tests measure no times
    part gpu tests 300
    wait $! || status=1
    part gpu rollout 240 ;;
  kernels)
    part gpu benchmark 330
    part gpu tune 240 ;;
  engine)
    part gpu train_step 480
    part gpu profile 90 ;;
  rehearse)
    for name in tests sanitize benchmark tune train_step rollout profile; do
      TRITON_INTERPRET=1 part dry "$name" 900
    done ;;
  tests | sanitize | benchmark | tune | train_step | rollout | profile) part gpu "$WHAT" 570 "$@" ;;
  *)
    echo "on_a_gpu.sh: unknown command '$WHAT'; expected first, kernels, engine, rehearse, or a part such as tune" >&2
    exit 2 ;;
esac
exit "$status"
