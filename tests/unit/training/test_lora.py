"""An adapter beside the routers: what is trained, merged, saved and resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from router_tuning.cli import main
from router_tuning.export import base_shape
from router_tuning.lora import (
    adapter_config,
    adapter_tensors,
    attach_adapter,
    load_adapter,
    merge_into_base,
    own_group,
    without_adapter,
    write_adapter,
)
from router_tuning.model import (
    attach_routers,
    freeze_base,
    given_prompts,
    load_base,
    load_reference,
    reference_logits,
    routing_of,
)
from tests.support.architectures import EXPERTS
from tests.support.models import tiny_model
from tests.unit.training.test_trainer import interrupt_after_step, one_error, routers_of, train
from vllm_mod.checkpoint import read_mod_config
from vllm_mod.config import ConfigError, ModConfig

LORA = ["--lora-r", "4", "--lora-learning-rate", "0.01"]
GRANULARITIES = ["attn_sequence", "attn_token", "mlp_token", "block_sequence"]


def make_config(granularity: str, layers: list[int]) -> ModConfig:
    return ModConfig.parse({"version": 1, "granularity": granularity, "layers": layers}, "test")


def settings_for(base: Path, config: ModConfig, **flags):
    from router_tuning.arguments import RouterArguments

    args = RouterArguments(model=str(base), data=["x"], output="y", **{"lora_r": 4, **flags})
    return adapter_config(args, config, base, base_shape(base))


def adapted(base: Path, granularity: str = "attn_token", **flags):
    """A routed model with an adapter, ready to train, and the adapter's settings."""
    config = make_config(granularity, [1, 2])
    model = load_base(base, torch.float32)
    attach_routers(model, config, {i: torch.randn(1, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2)})
    freeze_base(model)
    settings = settings_for(base, config, **flags)
    attach_adapter(model, settings)
    return model, settings


def adapter_layers(model) -> set[int]:
    return {int(name.split(".")[4]) for name in adapter_tensors(model)}


def test_by_default_it_sits_from_the_first_routed_layer_on(base_dir):
    model, settings = adapted(base_dir)
    assert adapter_layers(model) == {1, 2, 3} and len(settings.target_modules) == 7
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"model.layers.{i}.router.weight" for i in (1, 2)} < trained
    assert all(".router." in name or ".lora_" in name for name in trained)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layers", [None, ["0-3"]])
def test_every_adapter_gets_the_gradient_of_the_unfrozen_model(base_dir, granularity, layers):
    """The trunk's short cut must not cut it: compare with a model in which nothing is frozen."""
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))

    def gradients(freeze: bool):
        torch.manual_seed(1)
        model, _ = adapted(base_dir, granularity, lora_layers=layers)
        if not freeze:
            model.requires_grad_(True)
            model.model.layers[0]._forward_pre_hooks.clear()
            model.model.layers[0]._forward_pre_hooks_with_kwargs.clear()
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.1)
        with given_prompts(model):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if ".lora_" in n or ".router." in n}

    frozen, free = gradients(True), gradients(False)
    assert len(frozen) == 2 + 14 * (3 if layers is None else 4)
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, free[name], msg=name)
    assert sum(bool(g.abs().sum() > 0) for g in frozen.values()) > len(frozen) // 2


def test_it_has_a_learning_rate_of_its_own(base_dir):
    model, _ = adapted(base_dir)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    own_group(optimizer, model, 1e-4, 0.0)
    routers, adapter = optimizer.param_groups
    assert (routers["lr"], adapter["lr"]) == (0.5, 1e-4)
    assert {id(p) for p in routers["params"]} == {id(r.weight) for r in routing_of(model).routers.values()}
    assert len(adapter["params"]) == 2 * 7 * 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_merged_and_unmerged_checkpoints_compute_the_same(base_dir, data_file, tmp_path, granularity):
    """The same run, written both ways, in float32; neither is the base any more."""
    for output in ("merged", "adapter"):
        more = (*LORA, "--lora-output", output, "--granularity", granularity)
        assert train(base_dir, data_file, tmp_path / output, *more) == 0
    merged, unmerged = tmp_path / "merged", tmp_path / "adapter"
    assert all(torch.equal(w, routers_of(unmerged)[name]) for name, w in routers_of(merged).items())
    assert not (merged / "adapter").exists() and not (tmp_path / "merged.run").exists()
    assert os.path.samefile(unmerged / "model.safetensors", base_dir / "model.safetensors")
    old, new = load_file(base_dir / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {int(name.split(".")[2]) for name in old if not torch.equal(old[name], new[name])}
    assert changed == {1, 2, 3} and set(old) == set(new)
    one, other = load_reference(merged), load_reference(unmerged)
    for seed in range(4):
        ids = torch.randint(3, 100, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        logits = reference_logits(one, ids, 6)
        torch.testing.assert_close(logits, reference_logits(other, ids, 6), atol=1e-3, rtol=0)
        with without_adapter(other):
            assert (logits - reference_logits(other, ids, 6)).abs().max() > 1e-2
    settings = json.loads((unmerged / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["layers_to_transform"]) == (4, [1, 2, 3])
    assert json.loads((merged / "training_args.json").read_text())["lora_layers"] == ["1", "2", "3"]


def test_the_written_adapter_is_pefts(base_dir, data_file, tmp_path):
    from peft import PeftModel

    assert train(base_dir, data_file, tmp_path / "out", *LORA, "--lora-output", "adapter") == 0
    theirs = PeftModel.from_pretrained(load_base(base_dir, torch.float32), tmp_path / "out/adapter").eval()
    ours = load_base(base_dir, torch.float32).eval()
    load_adapter(ours, tmp_path / "out/adapter")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)


def test_export_takes_the_adapter_along(base_dir, data_file, tmp_path):
    assert train(base_dir, data_file, tmp_path / "out", *LORA, "--lora-output", "adapter") == 0
    parts = ["--routers", str(tmp_path / "out"), "--output", str(tmp_path / "copy")]
    assert main(["export", "--model", str(base_dir), *parts]) == 0
    ids = list(range(3, 12))
    one, other = (reference_logits(load_reference(tmp_path / name), ids, 6) for name in ("out", "copy"))
    assert torch.equal(one, other)
    assert "--lora-modules tuned=CKPT/adapter" in (tmp_path / "copy/README.md").read_text()


def test_an_interrupted_run_resumes_to_the_same_adapter(base_dir, data_file, tmp_path, monkeypatch):
    more = (*LORA, "--lora-dropout", "0.1", "--lora-output", "adapter")
    for name in ("whole", "again"):
        assert train(base_dir, data_file, tmp_path / name, *more) == 0
    interrupt_after_step(3, monkeypatch)
    assert train(base_dir, data_file, tmp_path / "parts", *more) == 130
    monkeypatch.undo()
    states = list((tmp_path / "parts.run").glob("checkpoint-*"))
    assert states and all((state / "adapter_model.safetensors").exists() for state in states)
    assert not any((state / "model.safetensors").exists() for state in states)
    assert train(base_dir, data_file, tmp_path / "parts", *more, "--resume", "true") == 0
    whole, routers = load_file(tmp_path / "whole/adapter/adapter_model.safetensors"), routers_of(tmp_path / "whole")
    assert all(w.abs().sum() > 0 for w in whole.values())
    for name in ("again", "parts"):
        other = load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        assert all(torch.equal(whole[key], other[key]) for key in whole), name
        assert all(torch.equal(w, routers_of(tmp_path / name)[key]) for key, w in routers.items()), name


def test_only_shards_with_adapted_weights_are_written_anew(base_dir, data_file, tmp_path):
    base = tmp_path / "base"
    load_base(base_dir, torch.float32).save_pretrained(base, max_shard_size="15KB")
    for file in base_dir.iterdir():
        if file.suffix != ".safetensors" and not (base / file.name).exists():
            (base / file.name).write_bytes(file.read_bytes())
    shards = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    before = {name: (base / name).read_bytes() for name in set(shards.values())}
    assert train(base, data_file, tmp_path / "out", *LORA) == 0
    assert {name: (base / name).read_bytes() for name in before} == before  # never through a link
    linked = {name for name in before if os.path.samefile(base / name, tmp_path / "out" / name)}
    adapted = {
        file for name, file in shards.items() if any(f"layers.{i}." in name and "_proj" in name for i in (1, 2, 3))
    }
    assert linked == set(before) - adapted and linked
    assert reference_logits(load_reference(tmp_path / "out"), [3, 4, 5], 2).isfinite().all()


def test_nothing_is_written_through_a_link_or_out_of_the_directory(base_dir, tmp_path):
    base, theirs = tmp_path / "base", tmp_path / "theirs.safetensors"
    base.mkdir()
    (base / "config.json").write_bytes((base_dir / "config.json").read_bytes())
    theirs.write_bytes((base_dir / "model.safetensors").read_bytes())
    before = theirs.read_bytes()
    model, _ = adapted(base_dir)
    ones = {name: torch.ones_like(tensor) for name, tensor in adapter_tensors(model).items()}
    index = base / "model.safetensors.index.json"
    for name in ("../theirs.safetensors", str(theirs)):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(theirs), name)}))
        with pytest.raises(ConfigError, match=r"index\.json: weight_map has .*theirs.* only the plain name"):
            merge_into_base(base, tmp_path / "out", ones, 0.5)
        with pytest.raises(ConfigError, match="weight_map has"):
            settings_for(base, make_config("attn_token", [1, 2]))
    index.unlink()
    (base / "model.safetensors").symlink_to(theirs)
    (tmp_path / "out").mkdir()
    os.link(theirs, tmp_path / "out" / "model.safetensors")  # of an attempt before
    merge_into_base(base, tmp_path / "out", ones, 0.5)
    assert theirs.read_bytes() == before
    assert not os.path.samefile(theirs, tmp_path / "out" / "model.safetensors")
    merged, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(merged[name], load_file(theirs)[name])


def test_a_merged_checkpoint_has_nothing_of_what_lies_beside_its_base(base_dir, data_file, tmp_path):
    """An adapter left beside it least of all: transformers would attach it to the merged weights."""
    base = tmp_path / "base"
    base.mkdir()
    for file in base_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    model, settings = adapted(base_dir)
    write_adapter(base, settings, {name: tensor + 1 for name, tensor in adapter_tensors(model).items()})
    (base / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    for name, source in (("plain", base_dir), ("beside", base)):
        assert train(source, data_file, tmp_path / name, *LORA) == 0
    plain, beside = ({path.name for path in (tmp_path / name).iterdir()} for name in ("plain", "beside"))
    assert beside == plain
    for file in ("model.safetensors", "routers.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("plain", "beside"))
        assert all(torch.equal(one[key], other[key]) for key in one), file


def test_experts_are_merged_where_they_are_linear_modules(tmp_path):
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3, "n_routed_experts": 4}
    base = tiny_model(tmp_path / "moe", "deepseek", num_experts_per_tok=2, n_shared_experts=1, **sizes)
    config = make_config("expert_token", [1])
    assert sorted(settings_for(base, config).target_modules) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    model = load_base(base, torch.float32)
    attach_routers(model, config)
    attach_adapter(model, settings_for(base, config, lora_target_modules=["up_proj"], lora_layers=["1"]))
    names = [name for name in adapter_tensors(model) if ".experts." in name]
    assert len(names) == 2 * 4 and adapter_layers(model) == {1}  # the layer's number, not the expert's
    ones = {name: torch.ones_like(tensor) for name, tensor in adapter_tensors(model).items()}
    merge_into_base(base, tmp_path / "merged", ones, 0.5)
    old, new = (load_file(directory / "model.safetensors") for directory in (base, tmp_path / "merged"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    names = {f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight" for name in changed}
    assert names == {name for name in ones if ".lora_A." in name}
    for name in changed:  # B A of ones is the rank
        torch.testing.assert_close(new[name], old[name] + 0.5 * 4)
    assert any(".experts." in name for name in changed)


@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_beside_experts_are_written_as_peft_reads_them(tmp_path, name):
    """It renames what they target while it puts them in, and leaves sets behind."""
    from peft import LoraConfig

    base = tiny_model(tmp_path / "moe", name, num_hidden_layers=3, **EXPERTS[name])
    settings = settings_for(base, make_config("attn_token", [1]), lora_output="adapter")
    attach_adapter(model := load_base(base, torch.float32), settings)
    ones = {name: torch.ones_like(tensor) for name, tensor in adapter_tensors(model).items()}
    written = write_adapter(tmp_path / "adapter", settings, ones)
    read = LoraConfig.from_pretrained(str(written))
    assert read.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"} and not read.target_parameters
    load_adapter(again := load_base(base, torch.float32), written)
    assert adapter_tensors(again).keys() == ones.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-alpha", "8"], "--lora-alpha says nothing without an adapter"),
        (["--lora-output", "adapter"], "--lora-output adapter says nothing"),
        (["--lora-r", "-1"], "--lora-r -1"),
        (["--lora-r", "4", "--lora-dropout", "1"], "--lora-dropout 1.0"),
        (["--lora-r", "4", "--lora-learning-rate", "0"], "--lora-learning-rate 0.0"),
        (["--lora-r", "4", "--lora-alpha", "0"], "--lora-alpha 0"),
        (["--lora-r", "4", "--lora-layers", "2-9"], "--lora-layers: the model has layers 0 to 3"),
        (["--lora-r", "4", "--lora-target-modules", "q_proj", "w1"], "has no 'w1' in layers 1 to 3"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(
    base_dir, data_file, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr("router_tuning.run.load_base", lambda *_: pytest.fail("the model was loaded"))
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 2
    assert message in one_error(capsys)


def test_an_adapter_for_experts_is_refused_unless_merged(tmp_path):
    base = tiny_model(tmp_path / "moe", "olmoe", num_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="no adapter is served with expert_token; use merged"):
        settings_for(base, make_config("expert_token", [1]), lora_output="adapter")
    with pytest.raises(ConfigError, match=r"adapters on experts \('gate_proj'\) are not served"):
        settings_for(base, make_config("attn_token", [1]), lora_output="adapter", lora_target_modules=["gate_proj"])
    for targets, message in (
        (["up_proj"], "also targeting"),
        (["gate_proj", "up_proj", "down_proj"], "'down_proj' is no linear module of Olmoe"),
    ):
        settings = settings_for(base, make_config("attn_token", [1]), lora_target_modules=targets)
        with pytest.raises(ConfigError, match=f"--lora-target-modules: .*{message}"):
            attach_adapter(load_base(base, torch.float32), settings)


def test_quantised_weights_are_refused(base_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((base_dir / "config.json").read_bytes())
    tensors = {name: w.to(torch.int8) for name, w in load_file(base_dir / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"is I8 .*a matrix of floats is needed"):
        settings_for(tmp_path, make_config("attn_token", [1]))


def test_an_adapter_of_another_model_is_named(base_dir, data_file, tmp_path):
    assert train(base_dir, data_file, tmp_path / "out", *LORA, "--lora-output", "adapter") == 0
    assert read_mod_config(tmp_path / "out").layers == (1, 2)
    path = tmp_path / "out/adapter/adapter_model.safetensors"
    save_file({name: w[:1] for name, w in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="adapter: not an adapter of this model"):
        load_reference(tmp_path / "out")
