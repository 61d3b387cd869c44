"""Recipes: what is taken of which source, that it is the same again, and what is refused before any work."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_tuning.cli import main
from router_tuning.converters import NAMES
from router_tuning.data import describe, read_sources, split_tail, tokenize
from router_tuning.recipe import parse_recipe
from router_tuning.sources import Table
from vllm_mod.config import ConfigError

CONFIGS = Path(__file__).parents[3] / "training" / "router_tuning" / "configs"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two sources of 100 rows and one of 20, each of another form."""
    (tmp_path / "math").mkdir()
    write_lines(tmp_path / "math/a.jsonl", [{"query": f"m{i}", "response": "1"} for i in range(100)])
    write_lines(tmp_path / "code.jsonl", [{"instruction": f"c{i}", "output": "1"} for i in range(100)])
    talks = [[("human", f"t{i}"), ("gpt", "1")] for i in range(20)]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in talk]} for talk in talks]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    return tmp_path


def recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


def mixture(rows) -> Counter:
    return Counter(row["messages"][0]["content"][0] for row in rows)


MIXED = """
sources:
  - {data: math, converter: metamath, samples: 30}
  - {data: code.jsonl, converter: evol_codealpaca, portion: 0.5}
  - {data: talk.json, portion: 2.5}
"""


def test_every_source_gives_its_amount(folder):
    tables = read_sources([recipe(folder, MIXED)])
    train, held_out = split_tail(tables, 0.1)
    assert mixture(train) == {"m": 30, "c": 45, "t": 45}
    assert mixture(held_out) == {"m": 1, "c": 2, "t": 2}  # the same proportions, none twice
    assert set(
        Counter(r["messages"][0]["content"] for r in train if r["messages"][0]["content"][0] == "t").values()
    ) == {2, 3}
    assert [d.get("samples", d.get("portion")) for d in describe(tables)] == [30, 0.5, 2.5]


def test_the_seed_chooses_training_rows_and_never_held_out_ones(folder):
    tables = read_sources([recipe(folder, MIXED)])
    first, second = split_tail(tables, 0.1, seed=1), split_tail(tables, 0.1, seed=2)
    assert first == split_tail(read_sources([recipe(folder, MIXED)]), 0.1, seed=1)
    assert first[0] != second[0] and first[1] == second[1]


def test_samples_of_a_directory_are_spread_over_its_files(folder):
    write_lines(folder / "math/b.jsonl", [{"query": f"n{i}", "response": "1"} for i in range(50)])
    train, _ = split_tail(read_sources([recipe(folder, "sources: [{data: math, samples: 60}]")]), 0.1)
    assert mixture(train) == {"m": 40, "n": 20}


def test_equal_rows_are_left_out_once_and_counted(tokenizer):
    turns = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Yo"}]
    same = [{"messages": turns}, {"prompt": "Hi there", "completion": " Yo\n"}]
    other = [{"prompt": f"Hi {i}", "completion": "Yo"} for i in range(6)]
    train, held_out = split_tail({"a": [same[0], *other[:3], same[0]], "b": [*other[3:], same[1]]}, 0.2)
    assert held_out == [same[0]] and train == other  # a held-out row is never trained on
    assert (train.duplicates, held_out.duplicates) == (1, 1)
    _, counts = tokenize(train, tokenizer, 100)
    assert (counts.read, counts.duplicates) == (6, 1) and "1 duplicates" in str(counts)


def test_rows_without_content_are_not_each_others_duplicates(tokenizer):
    train, _ = split_tail({"a": [{"messages": []}, {"messages": []}, {}, {"text": "xyz"}]}, 0.0)
    counts = tokenize(train, tokenizer, 10)[1]
    assert len(train) == 4 and (counts.no_answer, counts.unreadable) == (2, 1)


@given(st.lists(st.tuples(st.integers(2, 60), st.floats(0.05, 4)), min_size=1, max_size=4), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_amounts_are_exact_and_held_out_rows_are_nobodys(sizes, seed):
    tables = {}
    for n, (size, portion) in enumerate(sizes):
        tables[str(n)] = Table({"text": f"{n} {i}"} for i in range(size))
        tables[str(n)].portion = portion
    train, held_out = split_tail(tables, 0.1, seed)
    texts = [row["text"] for row in train]
    assert not set(texts) & {row["text"] for row in held_out} and len(held_out) == len({r["text"] for r in held_out})
    for n, (size, portion) in enumerate(sizes):
        taken = Counter(text for text in texts if text.startswith(f"{n} "))
        distinct = size - max(1, round(size * 0.1))
        assert taken.total() == max(1, round(portion * distinct))
        assert max(taken.values()) - min(taken.values()) <= 1 and (len(taken) == distinct or portion < 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"recipe\.yaml: "),
        ("sources: []", r"recipe\.yaml: key 'sources'"),
        ("sources: {a", r"recipe\.yaml: not YAML: .*line 1"),
        ("source: []", r"unknown key 'source'|key 'sources' is required"),
        ("sources: [{converter: alpaca}]", r"sources\[0\]: key 'data' is required"),
        ("sources: [{data: absent.jsonl}]", r"sources\[0\]: key 'data': .*absent\.jsonl: no such file"),
        ("sources: [{data: math, file: b.jsonl}]", r"key 'file': .*math/b\.jsonl: no such file"),
        ("sources: [{data: math, converter: orca}]", r"sources\[0\]: key 'converter': one of auto, .*'orca'"),
        ("sources: [{data: code.jsonl}, {data: math, portion: 0}]", r"sources\[1\]: key 'portion'"),
        ("sources: [{data: math, portion: -1}]", r"key 'portion': .*greater than 0"),
        ("sources: [{data: math, portion: 11}]", r"key 'portion': .*10"),
        ("sources: [{data: math, portion: .nan}]", r"key 'portion'"),
        ("sources: [{data: math, portion: half}]", r"key 'portion'"),
        ("sources: [{data: math, samples: 0}]", r"key 'samples'"),
        ("sources: [{data: math, samples: 1.5}]", r"key 'samples'"),
        ("sources: [{data: math, samples: 5, portion: 0.5}]", r"exclude each other"),
        ("sources: [{data: math, samples: 101}]", r"recipe\.yaml: key 'samples': .*has 100 rows"),
        ("sources: [{data: math, weight: 1}]", r"sources\[0\]: unknown key 'weight'"),
        ("sources: [{data: math}, {data: math}]", r"a\.jsonl is listed twice"),
        (
            "sources: [{data: math, converter: alpaca}]",
            r"a\.jsonl: no row has .*'alpaca' reads \(no 'instruction'\); .*query, response",
        ),
    ],
)
def test_bad_recipes_are_refused_by_file_and_key(folder, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_sources([recipe(folder, text)])
    assert "\n" not in str(error.value)


def test_more_samples_than_distinct_training_rows(folder):
    tables = read_sources([recipe(folder, "sources: [{data: math, samples: 95}]")])
    with pytest.raises(ConfigError, match=r"95 samples are asked for, and 90 distinct training rows"):
        split_tail(tables, 0.1)


def test_plain_files_of_unknown_or_ambiguous_form_are_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ConfigError, match=r"a\.jsonl: no row has .* question, answer; converters: auto, "):
        read_sources([str(tmp_path / "a.jsonl")])
    write_lines(tmp_path / "a.jsonl", [{"query": "a", "response": "b", "instruction": "a", "output": "b"}])
    with pytest.raises(ConfigError, match=r"a\.jsonl: a row could be alpaca or metamath; .*recipe"):
        read_sources([str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize("text", ["sources: [{data: absent.jsonl}]", "sources: [{data: math, converter: orca}]"])
def test_bad_recipes_are_refused_before_a_model_is_fetched(folder, monkeypatch, capsys, text):
    monkeypatch.setattr("router_tuning.run.local_model", lambda *_: pytest.fail("the model was fetched"))
    path = recipe(folder, text)
    assert main(["train", "--model", "someone/model", "--data", path, "--output", str(folder / "out")]) == 2
    assert f"error: {path}: sources[0]: key" in capsys.readouterr().err


def test_rows_that_a_converter_cannot_read_are_told_and_counted(folder, tokenizer, caplog):
    write_lines(folder / "math/a.jsonl", [{"query": "m", "response": "1"}, {"query": "n"}])
    train, _ = split_tail(read_sources([recipe(folder, "sources: [{data: math, converter: metamath}]")]), 0.0)
    assert "a.jsonl: 1 of 2 rows lack what converter 'metamath' reads" in caplog.text
    counts = tokenize(train, tokenizer, 100)[1]
    assert (counts.unreadable, counts.reasons["unreadable"]) == (1, "no 'response'")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        read_sources([str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize("name", ["router_tuning", "alpaca"])
def test_the_shipped_recipes_are_valid(name):
    sources = parse_recipe(CONFIGS / f"{name}.yaml")
    assert all(source.converter in NAMES and "/" in source.data for source in sources)
    if name == "router_tuning":
        assert [source.portion for source in sources] == [2.9, 1, 1, 1, 1]


def test_hub_sources_pass_name_and_file(folder, monkeypatch):
    asked = []

    def load(name, data_files=None, split=None):
        asked.append((name, data_files, split))
        return [{"instruction": "a", "output": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    tables = read_sources([recipe(folder, "sources: [{data: someone/set, file: one.json}]")])
    assert asked == [("someone/set", "one.json", "train")] and list(tables) == ["someone/set: one.json"]
