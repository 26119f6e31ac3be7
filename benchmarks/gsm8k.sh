#!/usr/bin/env bash
# Seven methods on GSM8K from Qwen2.5-Coder-0.5B-Instruct, in nine minutes of one H200, runs side by side:
#
#     bash benchmarks/gsm8k.sh STAGE RESULTS DATA [more flags of real.py]
#
# STAGE    a folder that outlasts the call. In it lie model.gguf (of benchmarks/tie_gguf.py) and, where vLLM is not
#          installed, a folder site with its packages, with gguf and accelerate. Whatever is made is kept there, and a
#          second call goes on: a step, a run, an evaluation is not made twice.
# RESULTS  gets results.json, written again every 20 seconds, and each run's log
# DATA     holds gsm8k_train.jsonl, gsm8k_test.jsonl and SVAMP.json
#
# On another machine, of results.json: python benchmarks/real.py --task gsm8k --jobs 0 --results RESULTS
set -euo pipefail
stage=$1 results=$2 data=$3
shift 3
cd "$(dirname "$0")/.."
export PYTHONPATH=$stage/site${PYTHONPATH:+:$PYTHONPATH} VLLM_CACHE_ROOT=$stage/vllm-cache PYTHONUNBUFFERED=1
code=0
# A token of the cache takes 12 KB: 3 GB hold the 256 sequences of 800 tokens of an evaluation. A trainer with reference
# takes 13 GB beside the activations of 4,096 tokens (3 GB), seven of them 112 of 141 GB, while their engines sleep.
# Layers are not compiled: a minute for each run costs more than it gains.
timeout --signal TERM "${SECONDS_LEFT:-530}" python benchmarks/real.py --task gsm8k --data-dir "$data" \
    --model "$stage/model.gguf" --methods gt majority I II III random format --jobs 8 --steps 24 --save-every 8 \
    --eval-every 12 --limit 150 --questions-per-step 8 --rollouts 8 --max-response-tokens 400 --sampler vllm \
    --eval-sampler vllm --engine-cache-gb 3 --tokens-per-micro-batch 4096 "--train-flags=--fit off --compile off" \
    --out "$stage/out" --results "$results" "$@" || code=$?
cp -r "$stage/out/logs" "$results/" 2>/dev/null || true
shopt -s nullglob
for run in "$stage"/out/runs/*/metrics.jsonl; do
    echo "$(basename "$(dirname "$run")"): $(wc -l < "$run") rows"
done
exit $code
