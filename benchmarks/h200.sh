#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs a Hopper GPU, what fails soonest first. "check": models against the CPU, all tests marked gpu, and
# one model under compute-sanitizer, 6 minutes at most. "measure": every kernel, whole models, the PTX of engines, 8 minutes
# at most. JSON, pictures and a log go to $OUT (benchmarks/results without it). With no GPU it rehearses all parts on tiny
# shapes.
#
#   bash benchmarks/h200.sh check && bash benchmarks/h200.sh measure
#
# On a lent machine (torch 2.11, triton 3.6 there; transformers 5.17, older than our floor; no ModelOpt), once, here:
#
#   echo /.whl/ >> .git/info/exclude
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \
#     transformers==5.23.0 nvidia-modelopt==0.47.0 omegaconf==2.4.0 "pulp==3.3.2" pydantic==2.14.3 \
#     pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 datasets==5.1.0 dill==0.4.1 \
#     multiprocess==0.70.19 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 \
#     rpds-py==2026.9.1
#
# and there, with ".whl" in carry and timeout_s 600:
#
#   python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site .whl/*.whl \
#     && export PYTHONPATH=$PWD/.site COMMIT=<git rev-parse --short HEAD, here> && bash benchmarks/h200.sh check
#
# 35 MiB of wheels; the repository itself does not travel, hence COMMIT. What comes back: four JSON files, pictures, and
# one log.
#
# NVIDIA's experimental/dms as a peer is not part of this: see peer.py, and end_to_end.py --peer.

set -u
stage=${1:-}
case $stage in check | measure) ;; *) echo "usage: h200.sh check | measure" >&2 && exit 2 ;; esac
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Compiled once for all parts of this run, and never taken from an older one.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}
mkdir -p "$out"

if $python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  quick=()
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv,noheader
else
  quick=(--quick)
  echo "no GPU: a rehearsal with tiny shapes"
fi
date -u +"%Y-%m-%d %H:%M UTC"

# part NAME SECONDS COMMAND...: its output to a log, its exit code to the summary (124: interrupted at its time; what it had measured is kept)
summary=""
part() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  summary+=$(printf '%-12s exit %3d  %3d s of %d' "$name" "$code" $((SECONDS - begin)) "$limit")$'\n'
}

if [ "$stage" = check ]; then
  part first 60 env TRITON_INTERPRET=0 $python -m pytest -p no:cacheprovider -x -m gpu tests/gpu/test_gpu_models.py -k "logits_and_live_lengths"
  part tests 120 env TRITON_INTERPRET=0 $python -m pytest -p no:cacheprovider -m gpu tests
  # One case of each cache kernel under the checker of memory and of races between threads: slow, so few.
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  if [ -n "$sanitizer" ] && [ ${#quick[@]} -eq 0 ]; then
    for tool in memcheck racecheck; do
      part $tool 90 env TRITON_INTERPRET=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 9 \
        $python -m pytest -p no:cacheprovider -m gpu tests/gpu/test_gpu_models.py -k "logits_and_live_lengths and llama"
    done
  else
    echo "compute-sanitizer is not here, or there is no GPU" | tee "$out/memcheck.log" >"$out/racecheck.log"
  fi
else
  part kernels 130 $python benchmarks/kernels.py "${quick[@]}" --output "$out/kernels.json"
  part qwen3 210 $python benchmarks/end_to_end.py "${quick[@]}" --shape qwen3-8b --output "$out/end_to_end.json"
  part llama 80 $python benchmarks/end_to_end.py "${quick[@]}" --shape llama-3.1-8b --output "$out/end_to_end_llama.json"
  if [ ${#quick[@]} -eq 0 ]; then
    part engines 60 $python benchmarks/engine_kernels.py --output "$out/engine_kernels.json"
  else
    echo "the PTX of engines runs on a GPU only" >"$out/engines.log"
  fi
fi

# At most eight files come back from a lent machine: one log, and the results.
for name in first tests memcheck racecheck kernels qwen3 llama engines; do
  [ -e "$out/$name.log" ] || continue
  echo "== $name"
  cat "$out/$name.log"
  rm "$out/$name.log"
done >"$out/h200_$stage.log"

if [ "$stage" = check ]; then
  grep -E "passed|failed|skipped|deselected" "$out/h200_check.log"
else
  $python benchmarks/summary.py "$out/kernels.json" "$out/end_to_end.json" "$out/end_to_end_llama.json"
fi
printf '%s' "$summary"
