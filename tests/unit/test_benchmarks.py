"""The benchmarks' own arithmetic, and the scheduler's cost with a handful of requests."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kv_capacity, scheduler_cost
from benchmarks.common import isolated, llama_config, machine, markdown_table, routed_config


@pytest.mark.parametrize("num_layers", [4, 8, 16, 28, 32, 80])
def test_half_of_the_layers_are_routed(num_layers: int) -> None:
    layers = kv_capacity.routed_layers(num_layers)
    assert len(layers) == num_layers // 2
    assert min(layers) > 0 and max(layers) < num_layers - 1


def test_thresholds_skip_exactly_so_many() -> None:
    assert kv_capacity.thresholds([1, 3, 5], 2) == [1.0, 1.0, 0.0]


def test_routed_config(tmp_path: Path) -> None:
    base = llama_config(tmp_path / "base", num_hidden_layers=6)
    routed = routed_config(tmp_path / "routed", base, "attn_sequence", [1, 3], [1.0, 0.0])
    config = json.loads((routed / "config.json").read_text())
    assert config["architectures"] == ["LlamaMoDForCausalLM"] and config["num_hidden_layers"] == 6
    assert config["mod_config"]["threshold"] == [1.0, 0.0]


def test_what_a_number_depends_on_is_recorded() -> None:
    record = machine()
    assert record["cores"] >= 1 and record["cpu"] and record["versions"]["vllm"]
    json.dumps(record)


def test_isolated_runs_see_their_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("BENCHMARK_TEST", raising=False)
    assert isolated(os.getenv, "BENCHMARK_TEST", BENCHMARK_TEST="1") == "1"
    assert "BENCHMARK_TEST" not in os.environ


def test_markdown() -> None:
    assert markdown_table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def last_line(capsys: Any) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_scheduler_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cost.json"
    few = ["--layers", "4", "--requests", "8", "--prompt", "40", "--steps", "32", "--repeats", "1"]
    scheduler_cost.main([*few, "--output", str(output)])
    line = last_line(capsys)
    assert set(line) == {"decode_us", "ratio", "worst_step_ratio", "whole_request_ratio"}
    assert set(line["decode_us"]) == {"stock", "pages", "skip"}
    assert json.loads(output.read_text())["managers"]["skip"]["decide_us"] > 0


@pytest.mark.parametrize(
    ("module", "wrong"),
    [(scheduler_cost, ["--steps", "17"]), (kv_capacity, ["--skip-share", "0.7"])],
)
def test_wrong_options_are_explained(module: Any, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.parse_args(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_plot(tmp_path: Path) -> None:
    point = {"max_running": 9, "output_tokens_per_second": 5.0, "seconds": 2.0, "cpu_seconds": 1.5}
    point |= {"seconds_of_all_repeats": [2.0, 3.0], "ideal_ratio": 1.0, "kept_ratio": None}
    kv_capacity.plot([point, point | {"kept_ratio": 1.0}, point | {"kept_ratio": 0.5}], tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_quarter_skipped_is_a_third_more_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kv_capacity.main(["--output", str(tmp_path / "result.json")])
    line = last_line(capsys)
    assert set(line) == {"kept_ratio", "max_running", "ratio", "ideal_ratio", "leaked_pages"}
    assert line["kept_ratio"] == 0.5 and line["leaked_pages"] == 0
    assert line["max_running"]["keep"] == line["max_running"]["stock"]
    assert line["ratio"] >= 1.30
