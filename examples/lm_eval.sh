#!/usr/bin/env bash
# Score a checkpoint with lm-eval's own vLLM backend; nothing in it is about routing.
set -eu
lm_eval --model vllm \
    --model_args "pretrained=${CKPT:-ckpt/example},dtype=auto,max_model_len=1024,enforce_eager=True" \
    --tasks "${TASKS:-boolq}" --batch_size auto "$@"
