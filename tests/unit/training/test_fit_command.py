"""`router-tuning fit`: from a base model and rows to a checkpoint that decides as it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from router_tuning import costs_file, kept_file, patched_choice, selection
from router_tuning.cli import main
from router_tuning.data import tokenize
from router_tuning.loading import fitting_dtype
from router_tuning.model import given_prompts, load_reference, routing_of
from router_tuning.patches import batch_size
from router_tuning.tokenizer import load_tokenizer
from tests.support.models import tiny_model
from vllm_mod.checkpoint import read_mod_config

ROWS = [
    {"prompt": f"{'count from' if i % 2 else 'say'} {i} and go on", "completion": f" {i + 1} {i * 7} done"}
    for i in range(60)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("fit") / "base", "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["fit", "--model", str(base), "--data", str(data), "--output", str(output)]
    return [*given, "--patch-rank", "2", "--window", "4", "--eval-fraction", "0", *more]


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
def test_it_keeps_what_was_asked_for(
    base: Path, data: Path, tmp_path: Path, granularity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference model decides on the rows that were measured: the target, and more than one pattern."""
    arguments = words(base, data, tmp_path / "c", "--granularity", granularity, "--layers", "0-3")
    assert main([*arguments, "--target-capacity", "0.6"]) == 0
    assert "each request's best" in capsys.readouterr().out
    config = read_mod_config(tmp_path / "c")
    assert (config.granularity, config.window, config.layers) == (granularity, 4, (0, 1, 2, 3))
    assert config.patch is not None and config.patch.rank == 2 and config.target_capacity == 0.6
    model = load_reference(tmp_path / "c")
    samples, _ = tokenize(ROWS, load_tokenizer(base), 512)
    keeps = []
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        prompt = torch.arange(ids.shape[1])[None] < sample["prompt_len"]
        with torch.no_grad(), given_prompts(model, prompt):
            model(input_ids=ids)
        keeps.append([bool(routing_of(model).decisions[layer].keep) for layer in range(4)])
    assert torch.tensor(keeps).float().mean() == pytest.approx(0.6, abs=0.12)
    assert "router-tuning fit" in (tmp_path / "c" / "train_command.txt").read_text()
    assert (tmp_path / "c" / "README.md").is_file() and (tmp_path / "c" / "patches.json").is_file()


def test_half_of_the_layers_by_default(base: Path, data: Path, tmp_path: Path) -> None:
    assert main(words(base, data, tmp_path / "c")) == 0
    assert len(read_mod_config(tmp_path / "c").layers) == 2


@pytest.mark.parametrize("more", [[], ["--static"]])
def test_so_many_layers_are_skipped_wherever_it_costs_least(
    base: Path, data: Path, tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(base, data, tmp_path / "c", "--skip", "2", *more)) == 0
    kept = [float(share) for share in re.findall(r"kept by (\S+) of the requests", capsys.readouterr().out)]
    config = read_mod_config(tmp_path / "c")
    assert len(kept) == len(config.layers) and sum(1 - share for share in kept) == pytest.approx(2, abs=0.1)
    assert all(share < 0.99 for share in kept)
    assert config.target_capacity == pytest.approx(1 - 2 / len(kept))
    if more:
        assert kept == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_written_as_they_are_served(data: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """In the base's own precision, routers in float32 whatever that is; the reference reads both."""
    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=4, dtype=dtype)
    assert main(words(base, data, tmp_path / "c")) == 0
    found = load_file(tmp_path / "c/routers.safetensors")
    assert {tensor.dtype for name, tensor in found.items() if "patch" in name} == {dtype}
    assert {tensor.dtype for name, tensor in found.items() if "patch" not in name} == {torch.float32}
    assert all(patch.up is not None for patch in routing_of(load_reference(tmp_path / "c")).patches.values())


@pytest.mark.parametrize(
    ("stored", "cpu", "more", "found"),
    [
        (torch.bfloat16, {"avx512_bf16": True}, None, torch.bfloat16),
        (torch.bfloat16, {"amx_bf16": True}, False, torch.float32),
        (torch.bfloat16, {"avx512_bf16": False}, None, torch.float32),
        (torch.float32, {"avx512_bf16": True}, None, torch.float32),
        (torch.float32, {}, True, torch.bfloat16),
    ],
)
def test_bf16_where_it_is_fast_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, cpu: Any, more: bool | None, found: Any
) -> None:
    base = tiny_model(tmp_path / "base", "llama", dtype=stored)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert fitting_dtype(base, more) == found


def test_patches_are_for_requests_that_no_router_has_seen(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fitted and distilled on the decisions of fits without them; samples that were not measured have routers' own."""
    seen: dict[str, list[Any]] = {}

    def noted(name: str, place: int) -> None:
        inner = getattr(patched_choice, name)

        def instead(*args: Any) -> Any:
            seen[name] = [sample["scores"] for sample in args[place]]
            return inner(*args)

        monkeypatch.setattr(patched_choice, name, instead)

    noted("collate", 0)
    noted("make_patches", 1)
    more = ["--measured-samples", "24", "--max-samples", "30", "--distilled-samples", "30", "--compare-static", "false"]
    assert main(words(base, data, tmp_path / "c", *more)) == 0
    config = read_mod_config(tmp_path / "c")
    shares = [float(share) for share in re.findall(r"kept by (\S+) of the requests", capsys.readouterr().out)]
    for scores in map(torch.stack, seen.values()):
        assert scores.shape == (30, len(config.layers)) and scores.isnan().any(1).sum() == 6
        known = scores[~scores.isnan().any(1)]
        assert (known >= torch.tensor(config.cutoffs)).double().mean(0).tolist() == pytest.approx(shares, abs=0.006)


def test_patches_are_distilled_but_where_they_shall_not_be(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for number in ("0", "40"):
        assert main(words(base, data, tmp_path / number, "--distilled-samples", number)) == 0
        written.append(load_file(tmp_path / number / "routers.safetensors"))
    said = re.search(r"answers: (\S+) as fitted, (\S+) distilled", capsys.readouterr().out)
    assert said is not None and float(said[2]) <= float(said[1])
    assert written[0].keys() == written[1].keys()
    changed = {name for name in written[0] if not torch.equal(written[0][name], written[1][name])}
    assert all("patch" in name for name in changed) and bool(changed) == (said[1] != said[2])


def test_static_is_the_same_for_all(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words(base, data, tmp_path / "c", "--layers", "0-3", "--static", "--target-capacity", "0.25")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert sorted(re.findall(r"kept by (\S+) of the requests", said)) == ["0.00", "0.00", "0.00", "1.00"]
    costs = re.search(r"themselves: (\S+) routed, (\S+) the same", said)
    assert costs is not None and costs[1] == costs[2]
    config = read_mod_config(tmp_path / "c")
    assert isinstance(config.cutoff, tuple) and sum(cutoff <= 0 for cutoff in config.cutoff) == 1
    routers = [w for name, w in load_file(tmp_path / "c/routers.safetensors").items() if name.endswith("router.weight")]
    assert len(routers) == 4 and not any(weight.any() for weight in routers)


def measuring(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Notes how many samples each forward measured; Ctrl-C comes with forward `stop_at`."""
    numbers: list[int] = []
    inner = selection._measure_batch

    def noted(model: Any, batch: Any, progress: Any) -> Any:
        if len(numbers) == stop_at:
            raise KeyboardInterrupt
        numbers.append(len(batch["input_ids"]))
        return inner(model, batch, progress)

    monkeypatch.setattr(selection, "_measure_batch", noted)
    monkeypatch.setattr(selection, "_TOKENS", 200)
    return numbers


def test_an_interrupted_measurement_goes_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selection, "_TOKENS", 200)
    assert main(words(base, data, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        before = measuring(patch, stop_at=2)
        assert main(words(base, data, tmp_path / "c")) == 130
    assert f"costs of {sum(before)} samples are in {tmp_path / 'c.costs.safetensors'}" in capsys.readouterr().err
    assert not (tmp_path / "c").exists() and (tmp_path / "c.costs.safetensors").is_file()
    behind = measuring(monkeypatch)
    assert main(words(base, data, tmp_path / "c")) == 0
    assert len(before) == 2 and sum(before) + sum(behind) == len(ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]
    whole, resumed = (load_file(tmp_path / name / "routers.safetensors") for name in ("whole", "c"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_was_measured_is_written_now_and_then(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole file each time, so not after each forward: a killed process loses half a minute."""
    written: list[int] = []
    inner = costs_file.CostsFile.write

    def noted(self: costs_file.CostsFile) -> None:
        inner(self)
        written.append(0 if self.rows is None else len(self.rows.sample))

    clock = iter(range(0, 10**6, 11))  # every look is 11 seconds later
    monkeypatch.setattr(costs_file.CostsFile, "write", noted)
    monkeypatch.setattr(kept_file.time, "monotonic", lambda: float(next(clock)))
    numbers = measuring(monkeypatch)
    assert main(words(base, data, tmp_path / "c")) == 0
    seen = [sum(numbers[: place + 1]) for place in range(len(numbers))]
    assert len(numbers) > 6 and written == [0, *seen[2::3], len(ROWS)]  # patches first, all of it last


def test_a_gpu_is_given_more_at_once_but_no_more_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(kind: str, vocabulary: int) -> Any:
        return SimpleNamespace(device=torch.device(kind), config=SimpleNamespace(vocab_size=vocabulary))

    assert [selection.tokens_of_a_forward(model("cpu", size)) for size in (32, 256_000)] == [2048, 2048]
    for gib, vocabulary, tokens in ((64, 49_152, 9709), (64, 32, 32_768), (64, 256_000, 2048), (8, 49_152, 2048)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=gib << 30: (free, 80 << 30))
        assert selection.tokens_of_a_forward(model("cuda", vocabulary)) == tokens
    samples = [{"input_ids": [0] * length} for length in (10, 256, 30)]
    assert (batch_size(model("cpu", 32), samples), batch_size(model("cuda", 32), samples)) == (16, 128)
    assert batch_size(model("cuda", 32), [{"input_ids": [0] * 100_000}]) == 1


def test_measured_costs_serve_other_points(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--costs", str(tmp_path / "kept/costs.safetensors")]
    assert main(words(base, data, tmp_path / "a", *kept, "--measured-samples", "20")) == 0
    numbers = measuring(monkeypatch)
    assert main(words(base, data, tmp_path / "b", *kept)) == 0
    assert sum(numbers) == len(ROWS) - 20  # those that were not known yet
    numbers.clear()
    assert main(words(base, data, tmp_path / "c", *kept, "--static", "--target-capacity", "0.25")) == 0
    assert not numbers
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(selection, "fit_patches", lambda *_: pytest.fail("the file has the patches"))
        assert main(words(base, data, tmp_path / "p", *kept)) == 0
    assert main(words(base, data, tmp_path / "d", "--static", "--target-capacity", "0.25")) == 0
    alone, shared = (read_mod_config(tmp_path / name) for name in "dc")
    assert alone.layers == shared.layers
    assert alone.cutoff == pytest.approx(shared.cutoff, rel=1e-4)

    for more, message in [
        (["--window", "8"], "measured with another window"),
        (["--max-samples", "40", "--patch-rank", "3"], "measured with another samples, patch rank"),
        (["--granularity", "mlp_sequence"], "measured with another granularity"),
        (["--bf16", "true"], "measured with another model, precision"),
    ]:
        assert main(words(base, data, tmp_path / "e", *kept, *more)) == 2
        error = capsys.readouterr().err
        assert message in error and "costs.safetensors" in error and not (tmp_path / "e").exists()
    (tmp_path / "kept/costs.safetensors").write_text("no tensors")
    assert main(words(base, data, tmp_path / "e", *kept)) == 2
    assert "not a file of measured costs" in capsys.readouterr().err
    other = tiny_model(tmp_path / "other", "llama", num_hidden_layers=4, seed=7)
    (tmp_path / "kept/costs.safetensors").unlink()
    assert main(words(base, data, tmp_path / "f", *kept)) == 0
    assert main(words(other, data, tmp_path / "g", *kept)) == 2
    assert "measured with another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--window", "none"], "--window"),
        (["--window", "0"], "--window"),
        (["--target-capacity", "1"], "--target-capacity"),
        (["--patch-rank", "100000"], "--patch-rank"),
        (["--layers", "9"], "layers"),
        (["--max-samples", "3"], "usable samples"),
        (["--measured-samples", "15"], "--measured-samples 15: 16 or more are needed"),
        (["--patch-rank", "-1"], "--patch-rank"),
        (["--distilled-samples", "-1"], "--distilled-samples -1: 0 or more is needed"),
        (["--distilled-passes", "0"], "--distilled-passes 0: 1 or more is needed"),
        (["--seed", "-1"], "--seed -1: 0 to 4294967295 is needed"),
        (["--granularity", "attn_token"], "--granularity"),
        (["--skip", "4"], "--skip 4: the model has 4 layers"),
        (["--skip", "0"], "--skip 0"),
        (["--skip", "0.001"], "--skip 0.001: hardly any request would skip a layer"),
        (["--skip", "0.4", "--static"], "--skip 0.4: hardly any request would skip a layer"),
        (["--skip", "1", "--layers", "2"], "--skip chooses layers"),
        (["--skip", "1", "--target-capacity", "0.5"], "--skip chooses layers"),
        (["--costs", "/proc/nowhere/costs"], "/proc/nowhere/costs: cannot be written"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_one_line_and_nothing_written(
    base: Path, data: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:  # flags are refused by the parser, which exits itself
        sys.exit(main(words(base, data, tmp_path / "c", *more)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "c").exists()
