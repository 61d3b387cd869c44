#!/usr/bin/env bash
# Serve a checkpoint, ask it something, and see how many decisions kept their layer. Flags go to `vllm serve`.
set -eu
url="http://127.0.0.1:${PORT:-8000}"
vllm serve "${CKPT:-ckpt/example}" --served-model-name mod --port "${PORT:-8000}" --max-model-len 1024 "$@" &
trap 'kill $!; wait' EXIT
until curl --silent --fail "$url/health"; do kill -0 $!; sleep 1; done
curl --silent --fail "$url/v1/chat/completions" --header 'Content-Type: application/json' --data \
    '{"model": "mod", "max_tokens": 40, "messages": [{"role": "user", "content": "Give three tips for staying healthy."}]}'
curl --silent --fail "$url/metrics" | grep '^vllm:mod_'
