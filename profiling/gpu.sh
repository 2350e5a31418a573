#!/usr/bin/env bash
# Tests, memory and speed on a GPU, peers included, in one call, on a machine that need not build anything.
#
#   profiling/gpu.sh BINARIES [OUT]
#
# BINARIES holds `cuda` or `cuda-…` (the test binary tests/cuda.rs) and `memory-report`, both built with --features cuda; OUT, by
# default profiling/results/gpu, takes what is found, with device, driver and date. In the environment:
#   PYTHON     the Python that has the CUDA libraries and the peers (python3)
#   PEERS      more folders with packages of peers, colons between them
#   BATCH      rows of W1 and of the reference flow (65536)
#   RUNS       timed steps (5)
set -uo pipefail
[ $# -ge 1 ] || { sed -n 2,11p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
binaries=$(cd "$1" && pwd) || exit 2
out=${2:-$here/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
test_binary=$binaries/cuda
[ -x "$test_binary" ] || test_binary=$(find "$binaries" -maxdepth 1 -name 'cuda-*' -perm -u+x | head -n 1)
python=${PYTHON:-python3} batch=${BATCH:-65536} runs=${RUNS:-5} failed=0
step() { printf '\n== %s\n' "$*"; }

# The libraries of CUDA 13 that Python's packages bring.
for folder in $("$python" -c 'import site, sys; print("\n".join([*site.getsitepackages(), site.getusersitepackages()]))'); do
  for lib in cu13/lib cudnn/lib nccl/lib; do
    [ -d "$folder/nvidia/$lib" ] && LD_LIBRARY_PATH="$folder/nvidia/$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  done
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}

step machine
{
  date -u '+date: %Y-%m-%d %H:%M UTC'
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader | sed 's/^/gpu, driver, memory, capability: /'
  "$binaries/memory-report" --version | sed 's/^/program: /'
} | tee "$out/machine.txt"

step tests
tests() { "$test_binary" --test-threads=1 --show-output > "$out/$1" 2>&1 || { echo "$1: failed"; failed=1; }; }
tests tests.txt
CANDLE_ODE_CUDA_KERNELS=0 tests tests-without-kernels.txt
grep -h '^test result' "$out"/tests*.txt
grep -q '^skipped' "$out/tests.txt" && { echo 'no GPU was found by the tests'; failed=1; }

step 'peaks of the pool, step by step'
rm -rf "$out/steps" "$out/flow"
report=$binaries/memory-report
"$report" run --field mlp,conv,cnf --precision f32,bf16,f16 --steps 16,64 --device cuda:0 --out "$out/steps" || failed=1
"$report" run --field cnf --precision f32,bf16,f16 --steps 16 --batch "$batch" --device cuda:0 --out "$out/flow" || failed=1
"$report" compare "$out/steps" "$out/flow" --csv "$out/peaks.csv" --markdown "$out/peaks.md" || failed=1

step 'time and peak of a training step'
rm -f "$out/ours.jsonl" "$out/peers.jsonl"
for work in "W1 --batch $batch" W3 W5; do
  for precision in f32 bf16 f16; do
    for kernels in 1 0; do
      # shellcheck disable=SC2086 # a work and its flags
      CANDLE_ODE_CUDA_KERNELS=$kernels "$report" bench-peer $work --precision $precision --device cuda:0 --runs "$runs" \
        --no-error | tee -a "$out/ours.jsonl"
      [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    done
    for peer in torchdiffeq torchdiffeq-adjoint rampde diffrax diffrax-backsolve; do
      # shellcheck disable=SC2086
      set -- $work
      "$python" "$here/gpu/peers.py" "$1" $peer $precision "${@:2}" --runs "$runs" | tee -a "$out/peers.jsonl"
    done
  done
done
step 'errors of gradients'
for precision in f32 bf16 f16; do
  "$report" bench-peer W1 --precision $precision --device cuda:0 --runs 1 | tee -a "$out/ours.jsonl"
done

step bars
"$python" "$here/gpu/bars.py" "$out" | tee "$out/bars.md"
exit $failed
