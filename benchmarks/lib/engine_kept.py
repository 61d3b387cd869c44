"""The kept ratio that vLLM really had, from its own counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .common import routed_pairs

#: Of each answer. The first is there before the decision was heard.
_TOKENS = 2


def engine_kept(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Kept ratio in vLLM, in total and per layer, of requests with these prompts; of a checkpoint that decides."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint), dtype="float32", enforce_eager=True, block_size=32, kv_cache_memory_bytes=512 << 20,
        max_model_len=max(map(len, prompts)) + _TOKENS, disable_log_stats=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    kept, routed = routed_pairs(llm).values()
    layers = {str(i): round(kept.get(i, 0) / n, 3) for i, n in sorted(routed.items())}
    return {"total": round(sum(kept.values()) / sum(routed.values()), 4), "layers": layers}
