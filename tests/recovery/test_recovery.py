"""The recovery gate: what a routed checkpoint keeps of its base model's quality must not fall below what it was.

One YAML file beside this one per case. Recovery is relative to the base model in the same benchmark on the same
samples, and 1 means that nothing is lost: the quotient of perplexities (base / routed) for `heldout`, of accuracies
(routed / base) for each task of `quality`, and `mean` of them.

    base: demo/model                 a directory, from the project's root, or smollm2
    train: {data: [...], seed: 0}    flags of `router-tuning train`; or `routers: DIR`, routers that are there already
    measure: {benchmark: heldout}    and its flags, without CKPT, --model and --output
    kept: [0.4, 0.6]                 where the engine's kept ratio must lie: routers that keep all lose nothing
    recovery: {perplexity: 0.97}     the least, per metric
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from router_tuning import real_model
from vllm_mod.config import ConfigError

ROOT = Path(__file__).parents[2]
CASES = sorted(Path(__file__).parent.glob("*.yaml"))
Flags = dict[str, str | int | float | bool | list[str]]


class Measure(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)
    benchmark: Literal["heldout", "quality"]


class Case(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    base: str
    train: Flags | None = None
    routers: str | None = None
    measure: Measure
    kept: tuple[float, float]
    recovery: dict[str, float] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_source(self) -> "Case":
        if (self.train is None) == (self.routers is None):
            raise ValueError("either `train` or `routers` is needed")
        return self


def words(flags: Mapping[str, Any]) -> list[str]:
    """`{"data": ["a", "b"], "seed": 0, "per-layer": True}` -> command line."""
    found = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        found += [f"--{name}", *map(str, values)]
    return found


def measured(benchmark: str, line: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """(kept ratio, recovery per metric) from a benchmark's last line."""
    if benchmark == "heldout":
        return line["kept_ratio"]["total"], {"perplexity": 1 / line["quality"]["routed"]["ratio_to_dense"]}
    tasks = {name: row["checkpoint"] / row["base"] for name, row in line["tasks"].items() if row["base"]}
    return line["kept_ratio"], tasks | {"mean": line["recovery"]}


def failures(case: Case, kept: float, recovery: Mapping[str, float]) -> list[str]:
    low, high = case.kept
    found = [] if low <= kept <= high else [f"kept ratio {kept:.4f} is not in {low:g} to {high:g}"]
    for metric, least in case.recovery.items():
        if metric not in recovery:
            found.append(f"{metric} was not measured; there are: {', '.join(recovery)}")
        elif not recovery[metric] >= least:  # a NaN is a failure
            found.append(f"recovery of {metric} {recovery[metric]:.4f} is below {least:g}")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_recovery(path: Path, tmp_path: Path) -> None:
    case = Case.model_validate(yaml.safe_load(path.read_text()))
    if case.base in real_model.MODELS:
        try:
            real_model.fetch(case.base)
        except ConfigError as error:
            pytest.skip(str(error))
    checkpoint = tmp_path / "checkpoint"
    make = ["train", *words(case.train)] if case.train else ["export", "--routers", case.routers]
    run("-m", "router_tuning", *make, "--model", case.base, "--output", checkpoint)
    flags = words(case.measure.model_extra or {})
    output = ["--output", tmp_path / "result.json"]
    said = run("-m", f"benchmarks.{case.measure.benchmark}", checkpoint, "--model", case.base, *flags, *output)
    kept, recovery = measured(case.measure.benchmark, json.loads(said.splitlines()[-1]))
    print(f"{path.stem}: kept {kept:.4f}, recovery {recovery}")
    assert not failures(case, kept, recovery)


# ---------------------------------------------------------------- the gate itself

CASE = {
    "base": "b",
    "routers": "r",
    "measure": {"benchmark": "heldout"},
    "kept": [0.4, 0.6],
    "recovery": {"perplexity": 0.9},
}


def heldout(kept: float, ratio: float) -> list[str]:
    line = {"kept_ratio": {"total": kept}, "quality": {"dense": {}, "routed": {"ratio_to_dense": ratio}}}
    return failures(Case.model_validate(CASE), *measured("heldout", line))


def test_the_gate_closes():
    assert heldout(0.5, 1.1) == []
    assert heldout(0.5, 1.2) == ["recovery of perplexity 0.8333 is below 0.9"]
    assert heldout(0.5, float("nan")) == ["recovery of perplexity nan is below 0.9"]
    assert heldout(1.0, 1.0) == ["kept ratio 1.0000 is not in 0.4 to 0.6"]
    tasks = {"boolq": {"base": 0.8, "checkpoint": 0.6}, "gsm8k": {"base": 0.0, "checkpoint": 0.1}}
    line = {"kept_ratio": 0.5, "recovery": 0.75, "tasks": tasks}
    case = Case.model_validate(CASE | {"recovery": {"boolq": 0.9, "mean": 0.7, "gsm8k": 0.5}})
    assert failures(case, *measured("quality", line)) == [
        "recovery of boolq 0.7500 is below 0.9",
        "gsm8k was not measured; there are: boolq, mean",
    ]


@pytest.mark.parametrize(
    "change",
    [{"recovry": {}}, {"recovery": {}}, {"train": {"seed": 0}}, {"routers": None}, {"measure": {"benchmark": "speed"}}],
)
def test_a_case_that_would_check_nothing_is_refused(change):
    with pytest.raises(ValidationError):
        Case.model_validate(CASE | change)


def test_every_case_is_one():
    assert CASES
    for path in CASES:
        Case.model_validate(yaml.safe_load(path.read_text()))
