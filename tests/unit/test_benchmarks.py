"""The benchmarks' own arithmetic, and the scheduler's cost with a handful of requests."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kv_capacity, page_order, scaling, scheduler_cost, throughput
from benchmarks.lib import engines, shapes
from benchmarks.lib.common import fraction, isolated, llama_config, machine, markdown_table, result_file, routed_config

BENCHMARKS = Path(scaling.__file__).parent


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
    [
        (scheduler_cost, ["--steps", "17"]),
        (kv_capacity, ["--skip-share", "0.7"]),
        (throughput, ["--kept", "0.3"]),  # 8 routed layers
        (throughput, ["--kept", "1.5"]),
        (throughput, ["--patch-rank", "8", "--mixed"]),
        (throughput, ["--routed", "16"]),
        (scaling, ["--routed", "3"]),
        (scaling, ["--context", "40000"]),
        (throughput, ["--prompt", "40000"]),
        (page_order, ["--context", "33"]),
    ],
)
def test_wrong_options_are_explained(module: Any, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.parse_args(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_defaults_fit_every_shape(shape: str, tmp_path: Path) -> None:
    args = scaling.parse_args(["--shape", shape, "--routed", "2"])
    config = json.loads((llama_config(tmp_path, **shapes.SHAPES[shape]) / "config.json").read_text())
    assert scaling.longest(args) <= config["max_position_embeddings"]
    throughput.parse_args(["--shape", shape])


def test_page_orders_are_of_the_same_pages() -> None:
    tables = page_order.tables(layers=3, requests=2, blocks=5)
    for table in tables.values():
        assert table.shape == (3, 2, 5) and sorted(table.flatten().tolist()) == list(range(30))
    assert (tables["neighbours"].diff(dim=-1) == 1).all() and (tables["strided"].diff(dim=-1) == 3).all()


def test_page_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--layers", "2", "--requests", "2", "--context", "64", "--heads", "2", "--repeats", "3"]
    page_order.main([*few, "--output", str(tmp_path / "order.json")])
    assert set(last_line(capsys)["to_neighbours"]) == {"neighbours", "strided", "random"}


def test_plot(tmp_path: Path) -> None:
    point = {"max_running": 9, "output_tokens_per_second": 5.0, "seconds": 2.0, "cpu_seconds": 1.5}
    point |= {"seconds_of_all_repeats": [2.0, 3.0], "ideal_ratio": 1.0, "kept_ratio": None}
    kv_capacity.plot([point, point | {"kept_ratio": 1.0}, point | {"kept_ratio": 0.5}], tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly  # ten minutes
def test_a_quarter_skipped_is_a_third_more_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kv_capacity.main(["--output", str(tmp_path / "result.json")])
    line = last_line(capsys)
    assert set(line) == {"kept_ratio", "max_running", "ratio", "ideal_ratio", "leaked_pages"}
    assert line["kept_ratio"] == 0.5 and line["leaked_pages"] == 0
    assert line["max_running"]["keep"] == line["max_running"]["stock"]
    assert line["ratio"] >= 1.30


@pytest.mark.parametrize(("total", "number"), [(16, 8), (32, 16), (8, 4), (12, 5)])
def test_layers_are_spread(total: int, number: int) -> None:
    routed = shapes.routed_layers(total, number)
    assert len(routed) == number and min(routed) > 0 and max(routed) < total
    for skipped in range(number + 1):
        found = shapes.skipped_layers(routed, 1 - skipped / number)
        assert len(found) == len(set(found)) == skipped and set(found) <= set(routed)


def times(prefill: float, decode: float) -> engines.Times:
    found = engines.Times(requests=2)
    found.add("prefill", 20, prefill)
    found.add("decode", 2, decode)
    found.add("decode", 2, decode)
    return found


def test_rates() -> None:
    found = times(4.0, 1.0)
    assert found.rate("prefill") == 5 and found.rate("decode") == 2
    assert found.rate("pool") == 1  # two first tokens come from prefill: 6 in 6 seconds


def test_a_ratio_on_both_sides_of_one_is_not_significant() -> None:
    stock = [times(1, 1.0), times(1, 2.0), times(1, 1.0)]  # the machine was slow in the second repeat
    mod = [times(1, 0.8), times(1, 1.6), times(1, 0.8)]
    keep = [times(1, 1.1), times(1, 1.9), times(1, 1.0)]
    result = throughput.compared({"stock": stock, "mod": mod, "keep": keep}, "decode")
    assert result["speedup"] == 1.25 and result["spread"]["speedup"] == 0
    assert result["not_significant"] == ["overhead"]
    assert result["ceiling"] is None and result["fraction_of_static"] is None
    few = throughput.compared({"stock": stock[:2], "mod": mod[:2]}, "decode")
    assert few["not_significant"] == ["speedup"]  # two repeats say nothing of noise


def test_a_cutoff_between_scores() -> None:
    scores = [-2.0, -1.0, 1.0, 3.0]
    for skipped in range(5):
        cutoff = engines._between(scores, skipped)
        assert sum(s < cutoff for s in scores) == skipped


def test_where_a_result_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert result_file(str(tmp_path / "new" / "folder" / "r.json")) == tmp_path / "new/folder/r.json"
    assert result_file(str(tmp_path / "file")) and result_file("r.json") == Path("r.json")
    for bad in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="no file can be written there"):
            result_file(str(bad))


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py")))
def test_every_benchmark_looks_where_its_result_goes_before_the_work(name: str) -> None:
    source = (BENCHMARKS / f"{name}.py").read_text()
    looks = "output_argument(parser" in source or "type=result_file" in source
    assert looks or name == "redundant"  # which writes a model
    assert f'run_command(main, "{name}"' in source, "what is wrong is one line"


@pytest.mark.parametrize("text", ["0", "-0.1", "7", "1.01", "nan"])
def test_what_is_no_fraction(text: str) -> None:
    """Seven per cent that were written so held out all rows, those of training, too."""
    assert fraction("1") == 1 and fraction("0.02") == 0.02
    with pytest.raises(argparse.ArgumentTypeError, match="above 0, up to 1"):
        fraction(text)
