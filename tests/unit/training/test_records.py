"""Records of a checkpoint and of a state: they come back as they went, and what is wrong in one is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_tuning.counts import Counts
from router_tuning.records import ARGUMENTS_FILE, STATE_FILE, State, arguments_text, read_arguments, read_state
from vllm_mod.config import ConfigError
from vllm_mod.evaluation import EVALUATION_FILE, Evaluation, read_evaluation, write_evaluation
from vllm_mod.trainer_log import LOG_FILE, TrainerLog, read_log

STEP = {"step": 1, "loss": 2.4, "kept": 1.0, "lambda": 0.004, "scale": 0.02, "kept_per_layer": {"3": 1.0, "4": 1.0}}
COUNTS = Counts(read=70, used=64, too_long=6, reasons={"too_long": "260 tokens, 256 are allowed"}).to_dict()
LOG: dict[str, Any] = {
    "target_capacity": 0.5,
    "held_out": {
        "loss": 3.05, "perplexity": 21.2, "kept": 0.57, "kept_per_layer": {"3": 0.5, "4": 0.64},
        "dense_loss": 3.02, "dense_perplexity": 20.5,
        "kept_per_expert": {"3": [1.0, None]}, "selected_per_expert": {"3": [8, 0]},
    },
    "data": {
        "sources": ["d.jsonl"],
        "tables": [{"name": "d.jsonl", "rows": 72, "portion": 1.0, "fields_not_read": {"id": 72}}],
        "training": COUNTS, "held_out": COUNTS,
    },
    "log": [{"loss": 2.4, "grad_norm": None, "epoch": 1.0, "step": 1}],
    "steps": [STEP],
}  # fmt: skip
EVALUATION: dict[str, Any] = {
    "command": "python -m benchmarks.quality CKPT", "machine": {"cores": 2},
    "tasks": {"piqa": {"metric": "acc", "shots": 0, "samples": 1, "base": 1.0, "base_stderr": None, "checkpoint": 1.0,
                       "checkpoint_stderr": None, "truncated": 0.0, "kept_ratio": None}},
    "recovery": 1.0, "static_recovery": None, "kept_ratio": 0.5, "perplexity": {"base": 5.0},
    "curve": [{"system": "routed", "threshold": None, "kept": 0.5, "ratio_to_base": 1.1},
              {"system": "static", "layers": [3], "kept": 0.5, "ratio_to_base": 1.2}],
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "seed": 42, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "lora_r": 8, "lora_alpha": 16,
    "lora_layers": ["3", "4"], "weight_decay": 0.0, "a_flag_of_a_later_transformers": [1],
}  # fmt: skip
STATE: dict[str, Any] = {"capacity": {"weight": -0.01, "scale": 0.02}, "history": [STEP], "settings": {"seed": 42}}
RECORDS: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    LOG_FILE: (LOG, read_log),
    EVALUATION_FILE: (EVALUATION, read_evaluation),
    ARGUMENTS_FILE: (ARGUMENTS, read_arguments),
    STATE_FILE: (STATE, read_state),
}


def changed(record: dict[str, Any], path: str, value: Any = None, name: str | None = None) -> dict[str, Any]:
    """A copy in which `a.b` or `a.0.b` is `value`, or is called `name`, or (neither) is not there."""
    copy = json.loads(json.dumps(record))
    *parents, key = path.split(".")
    place = copy
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    old = place.pop(key)
    if name or value is not None:
        place[name or key] = old if name else value
    return copy


def test_each_comes_back_as_it_went(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text(TrainerLog.parse(LOG, "log").to_text())
    write_evaluation(tmp_path, Evaluation.parse(EVALUATION, "evaluation"))
    (tmp_path / ARGUMENTS_FILE).write_text(arguments_text(ARGUMENTS))
    State.parse(STATE, "state").write(tmp_path)
    for file, (record, read) in RECORDS.items():
        assert json.loads((tmp_path / file).read_text()) == record, file
        assert read(tmp_path) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(RECORDS)  # no temporary file is left


def test_what_json_has_no_number_for(tmp_path: Path) -> None:
    """transformers logs whatever a gradient was; a setting that is compared later comes back as it is."""
    text = TrainerLog.parse(LOG | {"log": [{"grad_norm": float("nan")}]}, "log").to_text()
    assert json.loads(text)["log"] == [{"grad_norm": None}]
    State.parse(STATE | {"settings": {"max_grad_norm": float("inf")}}, "state").write(tmp_path)
    assert read_state(tmp_path).settings == {"max_grad_norm": float("inf")}


@pytest.mark.parametrize(
    ("file", "path", "change", "said"),
    [
        (LOG_FILE, "held_out.kept_per_layer", {"name": "kept_per_leyer"}, "unknown key 'held_out.kept_per_leyer'"),
        (LOG_FILE, "held_out.kept_per_layer", {}, "key 'held_out.kept_per_layer' is required"),
        (LOG_FILE, "steps.0.lambda", {"name": "price"}, "key 'steps.0.lambda' is required"),
        (LOG_FILE, "steps.0.kept", {"value": "1.0"}, "key 'steps.0.kept': Input should be a valid number"),
        (LOG_FILE, "steps", {"value": {}}, "key 'steps': Input should be a valid list"),
        (LOG_FILE, "data.training.too_long", {"name": "to_long"}, "unknown key 'data.training.to_long'"),
        (EVALUATION_FILE, "recovery", {"name": "recovry"}, "key 'recovery' is required; unknown key 'recovry'"),
        (EVALUATION_FILE, "curve", {"name": "curves"}, "unknown key 'curves'"),
        (EVALUATION_FILE, "curve.0.system", {"value": "router"}, "key 'curve.0.system': "),
        (EVALUATION_FILE, "tasks.piqa.samples", {}, "key 'tasks.piqa.samples' is required"),
        (ARGUMENTS_FILE, "seed", {"name": "sead"}, "key 'seed' is required"),
        (ARGUMENTS_FILE, "lora_r", {"value": "8"}, "key 'lora_r': Input should be a valid integer"),
        (STATE_FILE, "capacity.weight", {}, "key 'capacity.weight' is required"),
        (STATE_FILE, "history.0.step", {"value": "1"}, "key 'history.0.step': Input should be a valid integer"),
        (STATE_FILE, "history", {"name": "story"}, "key 'history' is required; unknown key 'story'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, file: str, path: str, change: dict[str, Any], said: str) -> None:
    record, read = RECORDS[file]
    (tmp_path / file).write_text(json.dumps(changed(record, path, **change)))
    with pytest.raises(ConfigError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: ") and "\n" not in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("file", RECORDS)
def test_what_is_no_object(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("[]")
    with pytest.raises(ConfigError, match=rf"{file}: a JSON object is needed"):
        RECORDS[file][1](tmp_path)


def test_of_an_untrained_checkpoint(tmp_path: Path) -> None:
    assert read_log(tmp_path) is read_evaluation(tmp_path) is read_arguments(tmp_path) is None
    with pytest.raises(ConfigError, match=rf"{STATE_FILE}: no such file"):
        read_state(tmp_path)


def test_those_of_version_0_1(tmp_path: Path) -> None:
    """It told fewer reasons apart, counted no fields that are not read, and kept no settings in a state."""
    counts = {"read": 70, "used": 64, "no_answer": 0, "truncated": 3, "too_long": 6, "duplicates": 1}
    table = {"name": "d.jsonl", "rows": 72, "samples": 60}
    data = {"sources": ["d.jsonl"], "tables": [table], "training": counts, "held_out": counts}
    held_out = {key: value for key, value in LOG["held_out"].items() if not key.endswith("expert")}
    (tmp_path / LOG_FILE).write_text(json.dumps(LOG | {"held_out": held_out, "data": data}))
    (tmp_path / STATE_FILE).write_text(json.dumps(changed(STATE, "settings")))
    log = read_log(tmp_path)
    assert log is not None and log.data.training.used == 64 and log.data.training.unreadable == 0
    assert log.steps[0].price == 0.004 and log.held_out.kept_per_expert is None
    assert read_state(tmp_path).settings == {}


def test_every_reason_has_its_key() -> None:
    assert set(TrainerLog.parse(LOG, "log").data.training.model_dump()) == set(Counts().to_dict())
