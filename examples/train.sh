#!/usr/bin/env bash
# Train routers: every other parameter stays as it is. More flags are handed on: examples/train.sh --seed 1
set -eu
router-tuning train \
    --model "${MODEL:-demo/model}" \
    --data "${DATA:-demo/data.jsonl.gz}" \
    --output "${CKPT:-ckpt/example}" \
    --granularity attn_sequence --target-capacity 0.5 --max-length 256 "$@"
vllm-mod inspect "${CKPT:-ckpt/example}"
