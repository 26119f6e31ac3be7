#!/usr/bin/env bash
# Seven methods on GSM8K from Qwen2.5-Coder-0.5B-Instruct on one H200, runs side by side, in ten minutes:
#
#     bash benchmarks/gsm8k.sh STAGE RESULTS DATA [more flags of real.py]
#
# STAGE    a folder that outlasts the call. In it lie model (of benchmarks/pack_model.py) and, where vLLM is not
#          installed, a folder site with its packages. What is made is kept there, and a second call goes on: no run
#          and no evaluation that has ended is made twice.
# RESULTS  gets results.json, written again every 20 seconds, and in the end logs.txt
# DATA     holds gsm8k_train.jsonl, gsm8k_test.jsonl and SVAMP.json
#
# On another machine, of results.json: python benchmarks/real.py --task gsm8k --jobs 0 --results RESULTS
#
# To a machine that takes 64 MiB a call STAGE travels in 8 calls. vLLM's packages in site, here:
#     python benchmarks/pack_model.py MODEL.gguf .stage/model                        # 295 MiB
#     python benchmarks/pack_model.py MODEL.gguf .stage/random --bits 0              # without weights
#     tar -C .stage -cf - site | xz -T0 | split -b 58M -d - .stage/site-             # 3 parts
#     tar -C .stage -cJf .stage/rest.tar.xz data random                              # 3 MB
#     split -b 59M -d .stage/model/packed.safetensors .stage/model-                  # 5 parts
# There, each call with one part (the smallest of site also with rest.tar.xz), S=/tmp/stage:
#     mkdir -p $S && cat .stage/site-0? >> $S/site.tar.xz
#     the third also: cd $S && tar -xJf site.tar.xz && tar -xJf rest.tar.xz && cp -r random model && cd -, and as random
#     weights compile what the model's will need, while it travels:
#         RUNS=/tmp/warm setsid bash benchmarks/gsm8k.sh $S /tmp/warm-results $S/data --model $S/random --methods gt \
#             --steps 1 --limit 9 < /dev/null > /tmp/warm.log 2>&1 & echo $! > /tmp/warm.pid
#     cat .stage/model-0? >> $S/packed
#     the last also: kill -9 -- -$(cat /tmp/warm.pid); rm -rf /tmp/warm; mv $S/packed $S/model/packed.safetensors
#         setsid bash benchmarks/gsm8k.sh $S /tmp/results $S/data < /dev/null > /tmp/gsm8k.log 2>&1 &
#     then, until logs.txt is there: sleep 200; cp /tmp/results/* /tmp/*.log $OUT/
# A process in a session of its own outlives its call.
#
# Predicted seconds, of which nothing has run on a GPU: start of seven runs and an evaluation 50 (130 without what was
# compiled before), 20 steps of 18 (policy 6, teacher 2, reference 1, update 7, loads of weights 2), checkpoints 10,
# evaluations 110. Where it takes longer, runs are cut for the evaluations' sake.
set -euo pipefail
stage=$1 results=$2 data=$3 seconds=${SECONDS_LEFT:-600}
shift 3
cd "$(dirname "$0")/.."
export PYTHONPATH=$stage/site${PYTHONPATH:+:$PYTHONPATH} VLLM_CACHE_ROOT=$stage/vllm-cache PYTHONUNBUFFERED=1
out=${RUNS:-$stage/out}
mkdir -p "$results"
code=0
# 494M parameters: a trainer with reference or teacher takes 18.5 GB in the update, seven of them 130 of 150, while their
# engines sleep (with micro-batches of 4,096 tokens it would be 150). A token of the cache takes 12 KB: 4 GB hold the 600
# sequences of an evaluation. Layers are not compiled: a minute for each run costs more than it gains. In the foreground,
# as real.py tells its runs to stop by itself: told twice, they would not save. They save the policy alone, 2 GB, once:
# with teacher and optimizer the last checkpoints would take 46 GB of the disk, and one every 8 steps twice that.
timeout --foreground --signal TERM --kill-after 60 "$seconds" python benchmarks/real.py --task gsm8k \
    --data-dir "$data" --model "$stage/model" --methods III II gt majority I random format --same-rollouts --jobs 8 \
    --steps 20 --train-seconds $((seconds > 300 ? seconds - 150 : seconds)) --save-every 0 --eval-every 0 --limit 150 \
    --eval-batch 150 --max-response-tokens 400 --sampler vllm --eval-sampler vllm --engine-cache-gb 4 \
    --tokens-per-micro-batch 2048 "--train-flags=--fit off --compile off --save policy" --out "$out" \
    --results "$results" "$@" || code=$?
for log in "$out"/logs/*.txt; do
    echo "== $log"
    tail -c 200000 "$log"
done > "$results/logs.txt" || true
exit $code
