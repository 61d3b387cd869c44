"""`router-tuning answers`: the base model's own answers, as rows that ask what was asked."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_tuning import answers
from router_tuning.chat import answered, prompt_digest, read_row
from router_tuning.cli import main
from router_tuning.data import tokenize
from router_tuning.model import load_base
from router_tuning.tokenizer import load_tokenizer
from tests.support.models import tiny_model
from tests.unit.training.test_trainer import one_error

TOKENS = 20  # fewer than a loop has


def ask(base: Path, data: Path, output: Path, *more: str) -> int:
    flags = ["--max-samples", "12", "--tokens", str(TOKENS), "--eval-fraction", "0", "--batch-size", "5", *more]
    return main(["answers", "--model", str(base), "--data", str(data), "--output", str(output), *flags])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prompts of many lengths; two ask the same."""
    asked = [f"{'what is ' * (n % 5)}{n}+{n}=" for n in range(11)] + ["0+0="]
    path = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": f"no {n}"}]}
        for n, words in enumerate(asked)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def greedily(model: Any, prompt: list[int], end: int) -> list[int]:
    """One token after another, of one prompt alone, without a cache."""
    ids = list(prompt)
    for _ in range(TOKENS):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


@torch.no_grad()
def test_they_are_what_the_model_says_to_each_prompt_alone(
    base_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(base_dir, data, tmp_path / "own.jsonl") == 0
    out = capsys.readouterr().out
    assert f"written: {tmp_path / 'own.jsonl'}" in out and "of 11" in out  # one asks what another does
    found = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows_of(tmp_path / "own.jsonl")}
    assert len(found) >= 8
    model, tokenizer = load_base(base_dir, torch.float32).eval(), load_tokenizer(base_dir)
    for words, answer in found.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert answer == tokenizer.decode(greedily(model, prompt, tokenizer.eos_token_id), skip_special_tokens=True)
    # And they can be read, as what was asked: held out where the data is.
    samples, counts = tokenize(rows_of(tmp_path / "own.jsonl"), tokenizer, 512)
    asked = {prompt_digest(row) for row in rows_of(data)}
    assert counts.used == len(found) and {sample["asked"] for sample in samples} <= asked


def test_settings_of_the_base_do_not_matter(data: Path, base_dir: Path, tmp_path: Path) -> None:
    """A temperature or a penalty of its generation config, which `generate` would follow."""
    base = tmp_path / "base"
    base.mkdir()
    for file in base_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    wanted = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    (base / "generation_config.json").write_text(json.dumps(wanted))
    assert ask(base_dir, data, tmp_path / "plain.jsonl") == ask(base, data, tmp_path / "settings.jsonl") == 0
    assert rows_of(tmp_path / "plain.jsonl") == rows_of(tmp_path / "settings.jsonl")


def test_an_interrupted_run_goes_on(
    base_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(base_dir, data, tmp_path / "whole.jsonl") == 0
    padded, calls = answers._padded, []

    def pressed(*args: Any) -> Any:
        calls.append(len(args[0]))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return padded(*args)

    monkeypatch.setattr(answers, "_padded", pressed)
    own = tmp_path / "own.jsonl"
    assert ask(base_dir, data, own) == 130 and not own.exists()
    assert "5 answers are in" in capsys.readouterr().err
    assert ask(base_dir, data, own) == 0
    assert calls == [5, 5, 5, 1]  # none is asked twice
    assert rows_of(own) == rows_of(tmp_path / "whole.jsonl")
    assert not (tmp_path / "own.jsonl.unfinished").exists()


def test_what_another_command_left_is_not_taken(
    base_dir: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(base_dir, data, tmp_path / "own.jsonl") == 0
    left = tmp_path / "again.jsonl.unfinished"
    for content in ('{"belongs_to": {}, "answers": {"0": [1, 2]}}', "no JSON", "[]", '{"belongs_to": 1}'):
        left.write_text(content)
        assert ask(base_dir, data, tmp_path / "again.jsonl") == 0 and not left.exists()
        assert rows_of(tmp_path / "again.jsonl") == rows_of(tmp_path / "own.jsonl")
        (tmp_path / "again.jsonl").unlink()
    assert "cannot be read, and is begun anew" in caplog.text


def test_loops_are_left_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of zeros says the same token for ever."""
    base = tiny_model(tmp_path / "base", "llama")
    model = load_base(base, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(base)
    assert ask(base, data, tmp_path / "own.jsonl", "--tokens", "30") == 2
    error = one_error(capsys)
    assert "no answer is of use" in error and not (tmp_path / "own.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "0"], "--tokens 0: 1 or more is needed"),
        (["--max-samples", "0"], "--max-samples 0: 1 or more is needed"),
        (["--eval-fraction", "1"], "--eval-fraction 1: a number from 0 to below 1 is needed"),
        (["--max-length", "3"], "no usable prompt (0 of 12 rows"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
        (["--output", "."], ".: exists already; choose another output or remove it"),
    ],
)
def test_bad_input_is_one_line(
    base_dir: Path, data: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(base_dir, data, tmp_path / "own.jsonl", *more) == 2
    assert message in one_error(capsys)
    assert not (tmp_path / "own.jsonl").exists() and not (tmp_path / "own.jsonl.unfinished").exists()


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)
CALLS = {"tool_calls": [{"id": "one", "type": "function", "function": {"name": "look", "arguments": {"a": 1}}}]}
TURNS = st.lists(st.sampled_from(["user", "assistant", "system", "tool"]), max_size=4)


@given(roles=TURNS, words=st.lists(WORDS, min_size=6, max_size=6), parts=st.booleans(), tools=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_row_asks_the_same_and_is_answered_once(
    roles: list[str], words: list[str], parts: bool, tools: bool
) -> None:
    """Whatever stands around it: calls, thoughts, context, a greeting, what comes behind."""
    messages: list[dict[str, Any]] = [{"role": role, "content": words[n]} for n, role in enumerate(roles)]
    for message in messages:
        if message["role"] == "assistant":
            message |= {"weight": 0, "reasoning": "thought"} | (CALLS if parts else {})
        if message["role"] == "tool":
            message["tool_call_id"] = "one"
    asking: Any = [{"type": "text", "text": words[4]}, {"type": "text", "text": "more"}] if parts else words[4]
    messages += [{"role": "user", "content": asking, "name": "someone"}]
    messages += [{"role": "assistant", "content": "first"}, {"role": "user", "content": "and"}]
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": "second"}]}
    if tools:
        row["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    new = json.loads(json.dumps(answered(read_row(row), words[5])))
    assert prompt_digest(new) == prompt_digest(row)
    assert new["messages"][-1] == {"role": "assistant", "content": words[5]}
    assert len(new["messages"]) == len(roles) + 2  # not what came behind
    assert bool(new.get("tools")) == tools


def test_a_completion_stays_one() -> None:
    row = {"prompt": "2+2=", "completion": "5"}
    found = read_row(row)
    assert prompt_digest(answered(found, "4")) == prompt_digest(row)
    assert found.plain is not None and answered(found.plain, "4") == {"prompt": "2+2=", "completion": "4"}
