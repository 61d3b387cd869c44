"""The page that several results of `heldout` make together."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import heldout_report
from vllm_mod.config import ConfigError


def row(ratio: float, to_routed: float, skipped: float) -> dict[str, float]:
    return {
        "ratio_to_dense": ratio, "ratio_to_dense_standard_error": 0.01, "ratio_to_routed": to_routed,
        "ratio_to_routed_standard_error": 0.002, "kl_to_dense": 0.1, "kl_standard_error": 0.01, "same_token": 0.9,
        "sublayers_skipped": skipped + 0.5, "sublayers_skipped_by_token": skipped,
    }  # fmt: skip


def record(granularity: str, skipped: float) -> dict[str, Any]:
    quality = {"dense": row(1, 0.9, 0), "routed": row(1.1, 1, skipped), "static-4": row(1.2, 1.015, 4)}
    return {"mod_config": {"granularity": granularity, "window": 64}, "samples": 77, "quality": quality}


def test_nats_are_logs_of_ratios() -> None:
    routed, static = heldout_report.points(record("attn_sequence", 3.9))
    assert routed["nats"] == pytest.approx(math.log(1.1)) and routed["error"] == pytest.approx(0.01 / 1.1)
    assert static["above"] == pytest.approx(0.015) and (static["skipped"], static["by"]) == (4, "token")
    old = record("attn_sequence", 3.9)
    del old["quality"]["routed"]["sublayers_skipped_by_token"]
    routed, _ = heldout_report.points(old)
    assert (routed["skipped"], routed["by"]) == (4.4, "request")


def test_a_page_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of kind and number, whatever the order of the files."""
    pytest.importorskip("matplotlib")
    files = []
    for number, (kind, skipped) in enumerate([("mlp_sequence", 5.0), ("attn_sequence", 8.0), ("attn_sequence", 3.9)]):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(record(kind, skipped)))
    output = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["heldout_report", *map(str, files), "--output", str(output)])
    heldout_report.main()
    lines = [line for line in output.read_text().splitlines() if "**routed**" in line]
    assert [line.split("|")[1].strip() for line in lines] == ["attentions", "attentions", "MLPs"]
    assert [line.split("|")[5].strip() for line in lines] == ["3.9", "8.0", "5.0"]
    assert [line.split("|")[2].strip() for line in lines] == ["[2](2.json)", "[1](1.json)", "[0](0.json)"]
    assert "1.5% ± 0.2%" in output.read_text() and "(page.png)" in output.read_text()
    assert "| 64 |" in output.read_text() and "| none |" not in output.read_text()
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_what_is_no_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers by sample lie beside each result."""
    beside = tmp_path / "result.samples.json"
    beside.write_text(json.dumps({"answer_tokens": [1, 2]}))
    monkeypatch.setattr(sys, "argv", ["heldout_report", str(beside), "--output", str(tmp_path / "page.md")])
    with pytest.raises(ConfigError, match=r"result\.samples\.json: not a result of benchmarks\.heldout"):
        heldout_report.main()
