"""`python -m benchmarks.heldout`, on the reference: what it refuses before the work, and what it keeps of it after."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import greedy, heldout
from benchmarks.lib.engine_kept import engine_kept
from benchmarks.lib.held_out import held_out
from router_tuning.data import read_sources, tokenize
from router_tuning.tokenizer import load_tokenizer
from tests.support.models import edit_json, random_routers, routed_checkpoint
from tests.unit.training.helpers import make_llama, make_tokenizer
from vllm_mod.checkpoint import read_mod_config, write_routers
from vllm_mod.config import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def routed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_checkpoint(base, tmp_path_factory.mktemp("made") / "mod", "attn_sequence", [1, 2])


@pytest.fixture(scope="module")
def static(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_checkpoint(base, tmp_path_factory.mktemp("made") / "drop", "attn_static", [1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"query": f"{a}+{a}=", "response": str(a + a)} for a in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_failing_engine_takes_nothing_along(
    base: Path, routed: Path, static: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(*args: object, **environment: str) -> dict[str, object]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(heldout, "isolated", engine)
    flags = [str(routed), "--model", str(base), "--data", str(data), "--fraction", "0.5", "--others", str(static)]
    with pytest.raises(RuntimeError, match="no memory"):
        heldout.main([*flags, "--output", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["samples"] == 4 and list(found["quality"]) == ["dense", "routed", "drop"]
    assert found["kept_ratio"] is None
    assert len(json.loads((tmp_path / "result.samples.json").read_text())["answer_tokens"]) == 4


def test_the_engines_kept_ratio_and_ctrl_c_in_it(
    base: Path, routed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    output = tmp_path / "result.json"
    flags = [str(routed), "--model", str(base), "--data", str(data), "--fraction", "0.5", "--output", str(output)]
    kept = {"total": 0.5, "layers": {"1": 1.0, "2": 0.0}}
    monkeypatch.setattr(heldout, "isolated", lambda *args, **environment: kept)
    heldout.main(flags)
    assert json.loads(output.read_text())["kept_ratio"] == kept
    assert json.loads(capsys.readouterr().out)["kept_ratio"] == kept

    def interrupted(*args: object, **environment: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(heldout, "isolated", interrupted)
    heldout.main(flags)
    assert json.loads(output.read_text())["kept_ratio"] is None and json.loads(output.read_text())["quality"]


def test_a_directory_may_be_called_static(
    base: Path, routed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless layers to drop are named, whose result is called so."""
    monkeypatch.setattr(heldout, "isolated", lambda *args, **environment: None)
    other = routed_checkpoint(base, tmp_path / "static", "attn_static", [1])
    flags = [str(routed), "--model", str(base), "--data", str(data), "--fraction", "0.5", "--others", str(other)]
    heldout.main([*flags, "--output", str(tmp_path / "result.json")])
    assert "static" in json.loads((tmp_path / "result.json").read_text())["quality"]
    with pytest.raises(ConfigError, match="static is taken"):
        heldout.main([*flags, "--static-layers", "2", "--output", str(tmp_path / "result.json")])


def test_a_static_drop_alone_asks_no_engine(
    base: Path, static: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "isolated", None)
    output = tmp_path / "result.json"
    heldout.main([str(static), "--model", str(base), "--data", str(data), "--fraction", "0.5", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["kept_ratio"] is None and found["quality"]["routed"]["sublayers_skipped"] == 1


def test_prompts_of_any_length_fit_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were cut to 1,024 tokens, and a longer one ended the benchmark behind all of its work."""
    vllm, seen = pytest.importorskip("vllm"), {}

    class LLM:
        def __init__(self, model: str, **flags: int) -> None:
            seen.update(flags)

        def generate(self, prompts: list, params: object) -> None:
            seen["answer"] = params.max_tokens

        def get_metrics(self) -> list[SimpleNamespace]:
            return [
                SimpleNamespace(name=f"vllm:mod_{name}", labels={"layer": "1"}, value=value)
                for name, value in (("kept", 1), ("routed", 4))
            ]

    monkeypatch.setattr(vllm, "LLM", LLM)
    assert engine_kept(Path("ckpt"), [[1] * 2000, [1]]) == {"total": 0.25, "layers": {"1": 0.25}}
    assert seen["max_model_len"] == 2000 + seen["answer"]


@pytest.mark.parametrize("command", [heldout.main, greedy.main], ids=["heldout", "greedy"])
def test_refused_before_the_work(
    command, base: Path, routed: Path, static: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (heldout, greedy):
        monkeypatch.setattr(module, "isolated", None)
    another = tmp_path / "another"
    make_llama(num_hidden_layers=6).save_pretrained(another)
    config = read_mod_config(routed)
    alone = write_routers(tmp_path / "alone", config, random_routers(config, 32))
    misfit = routed_checkpoint(base, tmp_path / "misfit", "attn_sequence", [1])
    edit_json(misfit / "config.json", mod_config=config.to_dict() | {"layers": [1, 9]})
    vocabulary = routed_checkpoint(base, tmp_path / "vocabulary", "attn_sequence", [1])
    edit_json(vocabulary / "config.json", vocab_size=64)
    cases: list[tuple[list[Path | str], Path, str]] = [
        ([routed, "--others", tmp_path / "a/dense"], base, "--others: .*dense is taken"),
        ([routed, "--others", static, tmp_path / "b/drop"], base, "--others: .*drop is taken"),
        ([alone], base, "router-tuning export --model .* --routers .*alone --output"),
        ([routed, "--others", alone], base, "router-tuning export"),
        ([misfit], base, "layer 9 is out of range"),
        ([tmp_path / "nowhere"], base, "nowhere/config.json: no such file"),
        ([base], base, "this model routes nothing"),
        ([routed], another, "another base model than --model"),
        ([vocabulary], base, "another base model than --model"),
        ([routed], routed, "give its base model"),
        ([routed, "--fraction", "0.01"], base, "--data: . usable held-out samples"),
    ]
    for words, model, said in cases:
        with pytest.raises(ConfigError, match=said):
            command([*map(str, words), "--model", str(model), "--data", str(data)])


def seen(data: Path, base: Path, checkpoint: Path, answers: range) -> None:
    """Let the record of `checkpoint` say that it was fitted on these rows."""
    rows = read_sources([str(data)])[str(data)]
    prompts = tokenize([rows[i] for i in answers], load_tokenizer(base), 128)[0]["asked"]
    record = {"samples": len(answers), "rank": 1, "layers": {}, "prompts": list(prompts)}
    (checkpoint / "patches.json").write_text(json.dumps(record))


@pytest.mark.parametrize("command", ["heldout", "greedy"])
def test_requests_that_a_checkpoint_was_fitted_on_are_left_out(
    command: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were not, and one of six held-out requests of a committed result was one of those."""
    routed = routed_checkpoint(base, tmp_path / "mod", "attn_sequence", [1, 2])
    static = routed_checkpoint(base, tmp_path / "drop", "attn_static", [1])
    seen(data, base, routed, range(5))  # the last of them is the first held out
    seen(data, base, static, range(6, 7))
    asked: list[int] = []

    def engine(function: object, path: Path, prompts: list[list[int]], *more: int, **environment: str) -> object:
        asked.append(len(prompts))
        return [[1, 2, 3]] * len(prompts) if command == "greedy" else {"total": 0.5, "layers": {}}

    module, output = {"heldout": heldout, "greedy": greedy}[command], tmp_path / "result.json"
    monkeypatch.setattr(module, "isolated", engine)
    flags = ["--model", str(base), "--data", str(data), "--fraction", "0.5", "--output", str(output)]
    module.main([str(routed), "--others", str(static), *flags])
    assert set(asked) == {2}  # 5 and 7 are left of 4 to 7
    asked.clear()
    module.main([str(routed), *flags])
    assert set(asked) == {3}


def test_what_routers_were_trained_on_cannot_be_held_out(base: Path, routed: Path, data: Path, tmp_path: Path) -> None:
    trained = routed_checkpoint(base, tmp_path / "mod", "attn_sequence", [1, 2])
    record = {"seed": 0, "learning_rate": 0.1, "per_device_train_batch_size": 8, "data": ["old/rows.jsonl"]}
    (trained / "training_args.json").write_text(json.dumps(record | {"eval_fraction": 0.25}))
    flags = [str(routed), "--model", str(base), "--data", str(data), "--others", str(trained), "--fraction"]
    with pytest.raises(
        ConfigError, match=r"--fraction 0\.5: .*mod was trained on all of .*rows\.jsonl but its last 0\.25"
    ):
        heldout.main([*flags, "0.5"])
    args = heldout.arguments([*flags, "0.25"])
    assert len(held_out(args, [trained])) == 2
    edit_json(trained / "training_args.json", data=["other.jsonl"])
    args = heldout.arguments([*flags, "0.5"])
    assert len(held_out(args, [trained])) == 4
