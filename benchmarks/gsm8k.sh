#!/usr/bin/env bash
# Seven methods on GSM8K from Qwen2.5-Coder-0.5B-Instruct on one H200, runs side by side, in nine minutes:
#
#     bash benchmarks/gsm8k.sh STAGE RESULTS DATA [more flags of real.py]
#
# STAGE    a folder that outlasts the call. In it lie model (of benchmarks/pack_model.py) and, where vLLM is not
#          installed, a folder site with its packages. Whatever is made is kept there or in the machine's memory, and a
#          second call goes on: a step, a run, an evaluation is not made twice.
# RESULTS  gets results.json, written again every 20 seconds, and logs.txt: two files
# DATA     holds gsm8k_train.jsonl, gsm8k_test.jsonl and SVAMP.json
#
# On another machine, of results.json: python benchmarks/real.py --task gsm8k --jobs 0 --results RESULTS
#
# A machine that takes 64 MiB a call gets STAGE in parts. Packed here, with vLLM as a site folder, 8 calls:
#     python benchmarks/pack_model.py MODEL.gguf .stage/model                              # 295 MiB
#     tar -C .stage -cf - site | xz -T0 | split -b 58M -d - .parts/site-                   # 3 parts
#     tar -C .stage -cf - model | split -b 59M -d - .parts/model-       # 5 parts
#     python benchmarks/pack_model.py MODEL.gguf .stage/random --bits 0                    # no weights
#     tar -C .stage -cJf .parts/rest.tar.xz data random                                    # 3 MB
# There:
#   1-3  cat .parts/* >> /tmp/site.tar.xz                                        each carries one part; 1 also rest.tar.xz
#   3    also unpacks both, and starts what compiles for 90 s while the model travels, a run of random weights:
#        RUNS=/tmp/warm setsid bash benchmarks/gsm8k.sh /tmp/stage /tmp/warm-results /tmp/stage/data \
#            --model /tmp/stage/random --methods gt --steps 1 --limit 9 < /dev/null > /tmp/warm.log 2>&1 &
#   4-8  cat .parts/model-* >> /tmp/model.tar
#   8    also unpacks it into /tmp/stage/model, and starts this script with setsid, RESULTS in /tmp: it outlives the call
#   9-   sleep 240; cp /tmp/results/* $OUT/                                      until logs.txt says that all is done
#
# Predicted seconds (nothing of it has run on a GPU): start of 7 runs and 1 evaluation 50, with what was compiled before;
# 16 steps of 18 (policy 6, teacher 2, reference 1, update 7, loads of weights 2), checkpoints 20, evaluations 110.
set -euo pipefail
stage=$1 results=$2 data=$3
shift 3
cd "$(dirname "$0")/.."
export PYTHONPATH=$stage/site${PYTHONPATH:+:$PYTHONPATH} VLLM_CACHE_ROOT=$stage/vllm-cache PYTHONUNBUFFERED=1
# Seven last checkpoints take 46 GB, for seconds: in memory if there is room, as a disk would take a minute.
out=${RUNS:-$stage/out} free=$(df --output=avail -BG /dev/shm 2>/dev/null | tail -1 | tr -dc 0-9)
[ "${free:-0}" -lt 56 ] || out=${RUNS:-/dev/shm/gsm8k}
code=0
# 494M parameters: a trainer with reference or teacher takes 18.5 GB in the update, seven of them 130 of 150, while their
# engines sleep (with micro-batches of 4,096 tokens it would be 150). A token of the cache takes 12 KB: 4 GB hold the 600
# sequences of an evaluation. Layers are not compiled: a minute for each run costs more than it gains. In the foreground,
# as real.py tells its runs to stop by itself: told twice, they would not save.
timeout --foreground --signal TERM "${SECONDS_LEFT:-530}" python benchmarks/real.py --task gsm8k --data-dir "$data" \
    --model "$stage/model" --methods III II gt majority I random format --same-rollouts --jobs 8 --steps 16 \
    --save-every 0 --eval-every 0 --limit 150 --eval-batch 150 --max-response-tokens 400 --sampler vllm \
    --eval-sampler vllm --engine-cache-gb 4 --tokens-per-micro-batch 2048 "--train-flags=--fit off --compile off" \
    --out "$out" --results "$results" "$@" || code=$?
for log in "$out"/logs/*.txt; do
    echo "== $log"
    tail -c 200000 "$log"
done > "$results/logs.txt" 2>/dev/null || true
exit $code
