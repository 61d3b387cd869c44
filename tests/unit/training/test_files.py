"""Kinds of local files, how they may be written, and what is read of a directory."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest

from router_tuning.data import describe, read_sources
from vllm_mod.config import ConfigError

ROWS = [{"text": "é"}, {"text": "b"}]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"n": 0}'}}


def names(tables: dict) -> list[str]:
    return [Path(name).name for name in tables]


def saved(rows: list[dict], directory: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(directory))
    return directory


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(LINES))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    (tmp_path / "e.json").write_bytes(LINES)
    (tmp_path / "f.csv").write_text("text\né\nb\n", encoding="utf-8")
    (tmp_path / "g.tsv.gz").write_bytes(gzip.compress("text\tn\r\né\t1\r\nb\t2\r\n".encode()))
    tables = read_sources([str(tmp_path)])
    assert names(tables) == ["a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.json", "e.json", "f.csv", "g.tsv.gz"]
    assert all(table == ROWS for table in tables.values())


@pytest.mark.parametrize("pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", LINES),
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.splitlines()[0] + b"\n" + codecs.BOM_UTF8 + LINES.splitlines()[1]),  # two files put together
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.csv", "text\né\nb\n".encode()),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, content, pack):
    path = tmp_path / (name + pack[0])
    path.write_bytes(pack[1](codecs.BOM_UTF8 + content))
    assert next(iter(read_sources([str(path)]).values())) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", codecs.BOM_UTF8, "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": ' + b"1" * 5_000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b"\xff\xff", "cannot be read: .*utf-8"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("a.json", LINES.decode().encode("utf-16-le"), "it is UTF-16; save it as UTF-8"),
        ("a.csv.gz", gzip.compress("text\na\n".encode("utf-16-be"), mtime=0), "it is UTF-16; save it as UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-12], "cannot be read"),
        ("a.json", b"[1, 2]", "a list of JSON objects"),
        ("a.csv", b"text\na,b\n", "row 1 has more values than the first line has names"),
        ("a.csv", b'text\n"a\n', "cannot be read: unexpected end"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.arrow", b"not arrow", "cannot be read"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}") as error:
        read_sources([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_missing_files_and_empty_directories_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.jsonl: no such file"):
        read_sources([str(tmp_path / "absent.jsonl")])
    with pytest.raises(ConfigError, match=r"absent\.parquet: no such file"):
        read_sources(["absent.parquet"])
    with pytest.raises(ConfigError, match="in this directory"):
        read_sources([str(tmp_path)])


def test_metadata_beside_the_data_is_not_read_and_the_rest_is_named(tmp_path, caplog):
    """As of a data set that was downloaded whole."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_bytes(LINES)
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    (tmp_path / "data/dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / "data/more.jsonl.zst").write_bytes(b"?")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/old.jsonl").write_text("not JSON")
    (tmp_path / "data/._train.jsonl").write_bytes(b"\x00\x05\x16\x07")  # of a Mac
    caplog.set_level("INFO")
    assert names(read_sources([str(tmp_path)])) == ["train.jsonl"]
    (tmp_path / "data/loop").symlink_to(tmp_path)
    assert names(read_sources([str(tmp_path)])) == ["train.jsonl"]
    assert caplog.messages[-1].endswith(
        "not data, not read: README.md, ._train.jsonl, dataset_info.json, loop, more.jsonl.zst, dataset_infos.json"
    )


def test_parquet_and_arrow_files_without_arrows_nulls(tmp_path):
    """Arrow gives every object the keys of all."""
    from datasets import Dataset

    rows = [
        {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [CALL]}], "system": "s"},
        {"messages": MESSAGES, "system": None},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    saved(rows, tmp_path / "saved")
    shutil.copy(tmp_path / "saved/data-00000-of-00001.arrow", tmp_path / "b.arrow")
    expected = [rows[0], {"messages": MESSAGES}]
    for name in ("a.parquet", "b.arrow", "saved"):
        (table,) = read_sources([str(tmp_path / name)]).values()
        assert table == expected, name


def test_a_directory_of_saved_data_sets(tmp_path, caplog):
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    saved(ROWS, tmp_path / "one")
    (tmp_path / "two.jsonl").write_bytes(LINES)
    caplog.set_level("INFO")
    tables = read_sources([str(tmp_path)])
    assert names(tables) == ["both", "one", "two.jsonl"]
    assert [list(table) for table in tables.values()] == [[{"text": "train"}], ROWS, ROWS]
    assert "both: not read: split test" in caplog.text
    assert next(iter(read_sources([str(tmp_path / "both/test")]).values())) == [{"text": "test"}]


def test_saved_data_sets_that_cannot_be_read_are_named(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"dev": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "dev"))
    with pytest.raises(ConfigError, match="dev: has the splits dev; give the folder of one"):
        read_sources([str(tmp_path / "dev")])
    saved(ROWS, tmp_path / "broken")
    next((tmp_path / "broken").glob("*.arrow")).unlink()
    with pytest.raises(ConfigError, match="broken: cannot be read"):
        read_sources([str(tmp_path / "broken")])


def test_fields_that_are_not_read_are_told_once_and_recorded(tmp_path, caplog):
    rows = [{"text": "a", "id": 1, "lang": "en"}, {"text": "b", "id": 2, "lang": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tables = read_sources([str(tmp_path)])
    assert [r.message for r in caplog.records if "not read" in r.message] == [
        f"{tmp_path / 'a.jsonl'}: fields that are not read (rows that have them): id (2), lang (1)"
    ]
    assert describe(tables)[0]["fields_not_read"] == {"id": 2, "lang": 1}


def test_rows_with_bad_values_stay_to_be_counted(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": 5, "output": "b"}, {"instruction": "c", "output": 7}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (table,) = read_sources([str(tmp_path)]).values()
    assert table[1] == {"unusable": ["bad_value", "instruction is 5, text is needed"]}
    assert table[2]["messages"][1]["content"] == 7  # found where rows are taken


def test_a_recipe_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "r.yaml").write_bytes(codecs.BOM_UTF8 + b"sources: [{data: a.jsonl}]")
    assert names(read_sources([str(tmp_path / "r.yaml")])) == ["a.jsonl"]
