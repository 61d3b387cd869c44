#!/usr/bin/env bash
# Set a checkpoint's thresholds for exactly this kept ratio, on rows that training held out.
set -eu
router-tuning calibrate "${CKPT:-ckpt/example}" \
    --data "${DATA:-demo/data.jsonl.gz}" --eval-fraction 0.02 \
    --target-capacity 0.6 "$@"
