"""`python -m benchmarks.quality` without an engine: its arithmetic, its tasks' data, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import quality
from benchmarks.lib.quality_report import text
from benchmarks.lib.tasks import TASKS, Load, check_tasks, leaves, load_tasks
from tests.support.models import routed_checkpoint
from tests.support.tasks import task_data
from vllm_mod.config import ConfigError


def test_the_papers_shots() -> None:
    shots = {name: task.shots for name, task in TASKS.items()}
    assert shots == {
        "boolq": 0, "rte": 0, "openbookqa": 0, "piqa": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5, "hellaswag": 10,
        "arc_challenge": 25,
    }  # fmt: skip


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=30))
def test_standard_error_is_lm_evals(values: list[float]) -> None:
    from lm_eval.api.metrics import mean_stderr

    mean, error = quality.mean_and_error(values)
    assert mean == pytest.approx(sum(values) / len(values))
    assert error == pytest.approx(mean_stderr(values))


def result(**values: list[float]) -> dict[str, Any]:
    tasks = {n: {"shots": 0, "values": v, "lengths": [64, 65, 99, 101], "kept": 3.0, "routed": 4.0}
             for n, v in values.items()}  # fmt: skip
    return {"tasks": tasks, "max_length": 101}


def test_recovery_is_a_mean_of_quotients() -> None:
    systems = {
        "base": result(boolq=[1, 1, 0, 0], piqa=[1, 1, 1, 1], gsm8k=[0, 0, 0, 0]),
        "checkpoint": result(boolq=[1, 0, 0, 0], piqa=[1, 1, 1, 0], gsm8k=[0, 0, 0, 1]),
    }
    found = quality.summary(systems)
    assert found["recovery"] == pytest.approx((0.5 + 0.75) / 2)
    assert found["static_recovery"] is None and found["left_out_of_recovery"] == ["gsm8k"]
    assert found["above_chance"] == {"tasks": ["piqa"], "checkpoint": 0.75}
    row = found["tasks"]["boolq"]
    assert row["checkpoint_difference"] == -0.25 and row["checkpoint_difference_stderr"] == 0.25
    assert row["truncated"] == 0.25 and row["in_window"] == 0.0  # vLLM generates a token, so 100 are allowed
    assert quality.kept_ratio(systems["checkpoint"]) == 0.75
    record = found | {"command": "c", "mod_config": {"granularity": "attn_token", "layers": [1]}, "kept_ratio": 0.75,
                      "static_layers": [], "static_checkpoint": None, "limit": 4}  # fmt: skip
    assert "is the base better than guessing" not in text(record, "quality")  # piqa: 1 of 1
    assert "(piqa): routed 0.750." in text(record, "quality")
    assert "| boolq | 0 | acc | 4 | 0.500 ± 0.289 | 0.250 ± 0.250 | -0.250 ± 0.250 |" in text(record, "quality")


def test_a_task_whose_requests_end_in_the_window_says_nothing_about_skipping() -> None:
    """PIQA's without shots are shorter than 64 tokens, but for a few: routed equalled dense to the last document."""
    systems = {
        "base": result(boolq=[1, 1, 0, 0], piqa=[1, 1, 1, 1]),
        "checkpoint": result(boolq=[1, 0, 0, 0], piqa=[1, 1, 1, 1]),
    }
    for system in systems.values():
        system["tasks"]["piqa"]["lengths"] = [30, 64, 65]
    found = quality.summary(systems, window=64)
    assert found["tasks"]["boolq"]["in_window"] == 0.25 and found["tasks"]["piqa"]["in_window"] == 0.6667
    assert found["recovery"] == 0.5 and found["left_out_of_recovery"] == ["piqa"]
    assert found["above_chance"] == {"tasks": [], "checkpoint": None}
    assert quality.summary(systems)["recovery"] == 0.75  # without a window all of them skip


def test_shots_where_the_paper_gives_fewer() -> None:
    load = Load(list(TASKS), 4, None, None, min_shots=6)
    assert [load.shots(name) for name in ("piqa", "mmlu", "hellaswag")] == [6, 6, 10]


def test_documents_are_matched_by_their_number() -> None:
    engine = {"documents": [["a", 0], ["a", 1], ["b", 0]], "values": [1, 0, 1], "likelihoods": [[-1.0], [-2.0], [-3.0]]}
    reference = {"documents": [["a", 0], ["b", 0]], "values": [1, 1], "likelihoods": [[-1.0], [-3.5]]}
    assert quality._compared(reference, engine) == {
        "samples": 2, "reference": 1.0, "vllm": 1.0, "largest_likelihood_difference": 0.5
    }  # fmt: skip


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.partial.json"
    quality.Finished(path, "command").get("base", lambda: 1)
    assert quality.Finished(path, "command").get("base", lambda: 2) == 1
    assert quality.Finished(path, "another command").get("base", lambda: 2) == 2
    path.write_text(json.dumps({"command": "command", "base": 1}))  # of a version that noted no lengths of requests
    assert quality.Finished(path, "command").get("base", lambda: 2) == 2


# ---------------------------------------------------------------- data


def test_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = task_data(tmp_path / "data")
    load = Load(["boolq", "gsm8k"], 3, str(data), None)
    assert check_tasks(load) == {"boolq": 3, "gsm8k": 3}


def test_shots_come_from_the_scored_split_where_training_documents_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = task_data(tmp_path / "data")
    _, found = load_tasks(Load(["hellaswag"], None, str(data), None))
    (task,) = leaves(found["hellaswag"])
    document = task.eval_docs[0]
    shots = task.sampler.set_rnd(0).sample(10, eval_doc=document)
    assert len(shots) == 10 and document not in shots


@pytest.mark.parametrize(
    ("limit", "parts", "each"), [(None, 57, None), (570, 57, 10), (60, 57, 1), (8, 57, 1), (3, 1, 3)]
)
def test_a_limit_is_spread_over_the_parts_of_a_task(limit: int | None, parts: int, each: int | None) -> None:
    class Group:
        def get_all_tasks(self) -> list[int]:
            return list(range(parts))

    found, number = Load(["mmlu"], limit, None, None).parts("mmlu", Group())
    assert number == each and found == sorted(set(found)) and len(found) == min(parts, limit or parts)


def test_missing_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"task piqa: .*--data-dir.* --tasks") as error:
        check_tasks(Load(["boolq", "piqa"], None, str(task_data(tmp_path / "data")), None))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "nonsense"], "'nonsense' is not known"),
        (["--data-dir", "/nowhere/at/all"], "--data-dir"),
        (["--limit", "0"], "--limit"),
        (["--min-shots", "-1"], "--min-shots"),
        ([], "pass --data, --static LAYER"),
        (["--static-checkpoint", "/nowhere/at/all"], "--static-checkpoint"),
        (["--static", "4", "--no-static"], "alternatives"),
    ],
)
def test_refused_at_once(tiny_llama_path: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    checkpoint = routed_checkpoint(tiny_llama_path, tmp_path / "mod", "attn_sequence", [4, 5])
    with pytest.raises(ConfigError, match=said):
        quality.main([str(checkpoint), "--model", str(tiny_llama_path), *flags])


def test_what_is_no_routed_checkpoint_is_refused(tiny_llama_path: Path, tmp_path: Path) -> None:
    static = routed_checkpoint(tiny_llama_path, tmp_path / "static", "attn_static", [4])
    routed = routed_checkpoint(tiny_llama_path, tmp_path / "routed", "attn_token", [4])
    for checkpoint, base, said in [
        (tmp_path / "nothing", tiny_llama_path, "is not a directory"),
        (tiny_llama_path, tiny_llama_path, "mod_config"),
        (static, tiny_llama_path, "give a routed one"),
        (routed, routed, "give its base model"),
    ]:
        with pytest.raises(ConfigError, match=said):
            quality.main([str(checkpoint), "--model", str(base), "--no-static"])


def test_model_args_are_json(tiny_llama_path: Path) -> None:
    with pytest.raises(SystemExit):
        quality.arguments(["c", "--model", str(tiny_llama_path), "--model-args", "x=1"])
    assert json.dumps(quality.arguments(["c", "--model", "m", "--model-args", '{"seed": 1}']).model_args)
