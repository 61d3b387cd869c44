"""`python -m benchmarks.redundant`: what stochastic depth skips, and that a model comes of it."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import redundant
from router_tuning.model import decoder_layers, load_base


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_skips_whole_attentions_of_single_samples(tiny_llama_path: Path, probability: float) -> None:
    model = load_base(tiny_llama_path, torch.float32)
    attention = decoder_layers(model)[3].self_attn
    seen: list[torch.Tensor] = []
    attention.register_forward_hook(lambda _, args, output: seen.append(output[0]))  # before, and
    redundant.stochastic_depth(attention, probability, torch.Generator().manual_seed(0))
    attention.register_forward_hook(lambda _, args, output: seen.append(output[0]))  # after
    model(torch.arange(10, 15).repeat(64, 1))
    before, after = seen
    kept = (after != 0).flatten(1).any(1)
    assert torch.equal(after[kept], before[kept])
    assert kept.double().mean().item() == pytest.approx(1 - probability, abs=0.2)
    assert probability in (0, 1) or 0 < kept.sum() < 64


def test_writes_a_model(tiny_llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": "yes, it is"}] for a in range(8)]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    flags = ["--model", str(tiny_llama_path), "--data", str(data), "--output", str(tmp_path / "model")]
    redundant.main([*flags, "--steps", "2", "--batch-size", "2", "--layers", "2", "5"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    before, after = (load_base(p, torch.float32).state_dict() for p in (tiny_llama_path, tmp_path / "model"))
    assert set(before) == set(after) and all(t.isfinite().all() for t in after.values())
    assert not torch.equal(before["model.layers.2.mlp.up_proj.weight"], after["model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(SystemExit):
        redundant.main(flags)
    assert "is there already" in capsys.readouterr().err
