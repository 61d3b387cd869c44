"""What an operator sees of a running engine."""

import logging
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine.llm_engine import LLMEngine

from tests.support.models import routed_checkpoint

from .harness import counter, engine, generate, random_prompts

LAYERS = [1, 3, 4, 6]
BYTES_PER_TOKEN = 2 * 2 * 32 * 4  # K and V, heads, head size, float32; of one layer


def per_layer(llm: Any, name: str) -> dict[int, float]:
    return {int(m.labels["layer"]): m.value for m in llm.get_metrics() if m.name == name}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def test_an_exact_share_of_skipped_layers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Thresholds 0 and 1: every number is known beforehand, and is in the metrics and in the log line."""
    # vLLM's line every ten seconds takes the counts with it: on a slow machine it came before ours.
    monkeypatch.setattr(LLMEngine, "do_log_stats_with_interval", lambda self: None)
    # Whatever earlier tests in this process left behind: vLLM's `suppress_logging` stays on where its block raises.
    logger = logging.getLogger("vllm.v1.metrics.loggers")
    caplog.set_level(logging.DEBUG, logger=logger.name)
    monkeypatch.setattr(logger, "disabled", False)
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, threshold=[1.0, 0.0, 1.0, 0.0])
    with engine(checkpoint) as llm:
        generate(llm, random_prompts([40, 50, 60]), [1, 20, 20])
        assert per_layer(llm, "vllm:mod_routed") == dict.fromkeys(LAYERS, 3)
        assert per_layer(llm, "vllm:mod_kept") == {1: 0, 3: 3, 4: 0, 6: 3}
        assert counter(llm, "vllm:mod_kv_pages_freed") == 2 * 2 * 2  # requests, token blocks, layers
        assert counter(llm, "vllm:mod_messages_ignored") == 1  # it ended with its first token
        assert counter(llm, "vllm:mod_kv_bytes_per_token") == 6 * BYTES_PER_TOKEN  # of eight layers
        lines = Lines()
        logger.addHandler(lines)
        llm.llm_engine.do_log_stats()
        logger.removeHandler(lines)
    for part in ("MoD kept=50.0%", "MoD kept per layer=1:0% 3:100% 4:0% 6:100%", "KV pages freed early=8"):
        assert part in lines.text, lines.text


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_sequence"])
def test_without_pages_per_layer_only_what_was_kept(base: Path, tmp_path: Path, granularity: str) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    with engine(checkpoint) as llm:
        generate(llm, random_prompts([40, 50, 60]), 4)
        routed, kept = per_layer(llm, "vllm:mod_routed"), per_layer(llm, "vllm:mod_kept")
        assert routed == dict.fromkeys(LAYERS, 3 if granularity == "mlp_sequence" else 150 + 3 * 3)
        assert 0 < sum(kept.values()) < sum(routed.values())
        assert counter(llm, "vllm:mod_kv_pages_freed") == counter(llm, "vllm:mod_kv_bytes_per_token") == 0
