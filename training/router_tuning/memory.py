"""A device that is full, as one line."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size

from vllm_mod.config import ConfigError


def out_of_memory(error: RuntimeError, way_out: str) -> ConfigError | None:
    """What to raise in place of `error` if it says that memory is used up; None if it says something else."""
    if not should_reduce_batch_size(error):
        return None
    return ConfigError(f"out of memory: {str(error).split('. ')[0]}; {way_out}")
