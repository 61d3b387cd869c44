"""What became of the data, from files to log, run record and model card: nothing disappears silently."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from random import Random

import pytest

from router_tuning.cli import main
from router_tuning.counts import LEFT_OUT, Counts, summary
from router_tuning.values import Unusable
from tests.support.models import edit_json, routed_checkpoint
from tests.unit.training.helpers import CHAT
from tests.unit.training.test_trainer import train

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"


def turn(question: str, answer: object, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


@pytest.fixture(scope="module")
def strict_base(base_dir, tmp_path_factory) -> Path:
    """Its template knows no system."""
    base = tmp_path_factory.mktemp("strict") / "llama"
    shutil.copytree(base_dir, base)
    (base / "chat_template.jinja").write_text(NO_SYSTEM + CHAT)
    return base


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """60 good rows and one or more of every other kind, behind a byte-order mark."""
    rows = [turn(f"{n}+1=", str(n + 1), id=n) for n in range(60)]
    rows += [turn("system", "a", system="Be brief."), turn("system", "b", system="Be kind.")]
    rows += [turn("number", 5), turn("part", [{"type": "image"}]), turn("nobody", ""), turn("é", "é")]
    rows += [turn("x" * 99, "long"), {"question": "a"}, rows[0], turn("tools", "c", tools=[{"name": "f"}])]
    path = tmp_path_factory.mktemp("data") / "mixed.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


EXPECTED = {
    "template_refused": (2, "no system here"),
    "bad_value": (2, ("assistant: content is 5, text is needed", "only text is trained on")),
    "no_answer": (1, "no assistant turn has words or calls"),
    "unverified": (1, "the tokens of an answer do not give its text again"),
    "too_long": (1, "tokens, 32 are allowed"),
    "unreadable": (1, "no 'text'"),
    "tokenizer_failed": (0, ""),
}


def test_a_training_run_tells_all_of_it(strict_base, mixed, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    more = ("--eval-fraction", "0.05", "--max-train-samples", "0")
    assert train(strict_base, mixed, tmp_path / "out", *more) == 0
    record = json.loads((tmp_path / "out/trainer_log.json").read_text())["data"]
    both = [Counts(**record[part]) for part in ("training", "held_out")]
    card = (tmp_path / "out/README.md").read_text()
    for kind, (number, reason) in EXPECTED.items():
        assert sum(getattr(counts, kind) for counts in both) == number, kind
        found = [counts.reasons[kind] for counts in both if kind in counts.reasons]
        assert all(any(words in f for words in ([reason] if isinstance(reason, str) else reason)) for f in found), kind
        assert not number or (found and LEFT_OUT[kind] in card and LEFT_OUT[kind] in caplog.text)
    assert sum(c.read for c in both) == 69 and sum(c.used for c in both) == 61 and both[0].duplicates == 1
    assert sum(c.not_shown.get("tools", 0) for c in both) == 1 and "tools of 1 rows" in card
    assert record["tables"][0]["fields_not_read"] == {"id": 61}
    assert "| mixed.jsonl | 70 | x 1 | id |" in card
    assert f"Training: {both[0]}." in card and f"training data: {both[0]}" in caplog.messages
    assert "fields that are not read (rows that have them): id (61)" in caplog.text


@pytest.mark.parametrize("command", ["train", "export", "calibrate"])
def test_data_of_no_use_is_refused_with_the_reason(base_dir, strict_base, data_file, tmp_path, capsys, command):
    data = tmp_path / "refused.jsonl"
    data.write_text("\n".join(json.dumps(turn(str(n), "a", system="Be brief.")) for n in range(20)))
    out, flags = tmp_path / "out", ["--data", str(data)]
    if command == "train":
        flags += ["--model", str(strict_base), "--output", str(out), "--use-cpu", "true"]
    elif command == "export":
        flags += ["--model", str(strict_base), "--output", str(out), "--drop-attention", "1"]
    else:
        assert main(["export", "--model", str(strict_base), "--output", str(out), "--routers", routers(tmp_path)]) == 0
        flags += [str(out), "--target-capacity", "0.5"]
    capsys.readouterr()
    assert main([command, *flags] if command != "calibrate" else [command, str(out), *flags[:2], *flags[3:]]) == 2
    error = capsys.readouterr().err
    assert "refused by the chat template (no system here)" in error and error.count("\n") == 1


def routers(tmp_path: Path) -> str:
    import torch

    from tests.unit.training.helpers import HIDDEN
    from vllm_mod.checkpoint import write_routers
    from vllm_mod.config import ModConfig

    config = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [1]}, "test")
    write_routers(tmp_path / "routers", config, {1: torch.randn(1, HIDDEN)})
    return str(tmp_path / "routers")


def test_every_kind_is_counted_and_said_once():
    counts = Counts(read=20, used=3, truncated=1, duplicates=2)
    for n in range(2):
        for kind in LEFT_OUT:
            counts.leave_out(Unusable(kind, f"{kind} number {n}"))
    text = str(counts)
    assert text == summary(json.loads(json.dumps(counts.to_dict())))
    assert all(f"2 {words} ({kind} number 0)" in text for kind, words in LEFT_OUT.items()) and "number 1" not in text
    assert text.startswith("3 of 20 rows") and text.endswith("1 truncated; 2 duplicates left out before")


def test_records_of_earlier_versions_can_be_shown():
    old = {"read": 5, "used": 4, "no_answer": 1, "truncated": 0, "too_long": 0}
    assert summary(old) == (
        "4 of 5 rows that were looked at are used; left out: 1 without an answer; 0 truncated; "
        "0 duplicates left out before"
    )


def test_texts_behind_a_bos_are_calibrated_by_their_words(base_dir, tmp_path, capsys):
    """From BOS alone every decision would be the same, and a layer could only be on or off."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    edit_json(
        base / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
        },
    )  # fmt: skip
    random = Random(0)
    texts = ["".join(random.choices("abcdefghijklmnop ", k=20)) for _ in range(40)]
    data = tmp_path / "texts.jsonl"
    data.write_text(
        "\n".join(json.dumps({"text": text} if n % 2 else {"completion": text}) for n, text in enumerate(texts))
    )
    checkpoint = routed_checkpoint(base, tmp_path / "out", "attn_sequence", (1, 2), seed=3)
    flags = ["--data", str(data), "--target-capacity", "0.5", "--per-layer", "true"]
    assert main(["calibrate", str(checkpoint), *flags]) == 0
    record = json.loads((checkpoint / "calibration.json").read_text())
    assert record["kept_per_layer"] == {"1": 0.5, "2": 0.5}
    assert record["rows"]["used"] == record["samples"] == 40
