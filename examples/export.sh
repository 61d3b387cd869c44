#!/usr/bin/env bash
# Checkpoints without training: routers that are there already joined with their base, and a static drop of two layers.
set -eu
router-tuning export --model "${MODEL:-demo/model}" \
    --routers "${CKPT:-ckpt/example}" --output "${CKPT:-ckpt/example}-joined"
router-tuning export --model "${MODEL:-demo/model}" \
    --drop-attention 2 --data "${DATA:-demo/data.jsonl.gz}" --output "${CKPT:-ckpt/example}-static" "$@"
