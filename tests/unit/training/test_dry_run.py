"""`router-tuning train --dry-run`: what it shows, what it writes, and that nothing stands in the real run's way."""

import json

import torch
from safetensors.torch import load_file

from router_tuning.cli import main
from router_tuning.dry_run import describe_sample
from router_tuning.model import load_base, load_reference, reference_logits
from tests.unit.training.test_trainer import FAST, one_error


def train(base, data, output, *more):
    return main(["train", "--model", str(base), "--data", str(data), "--output", str(output), *FAST, *more])


def test_a_dry_run_shows_what_would_be_learnt_and_leaves_room_for_the_real_one(base_dir, data_file, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # a second one takes the place of the first
        assert train(base_dir, data_file, out, "--dry-run") == 0
        shown = capsys.readouterr().out.splitlines()
        prompt, answer = (line.partition("|")[2].strip() for line in shown[1:3])
        assert prompt.startswith("'<|user|>") and prompt.endswith("=<|assistant|>'")
        a, _, b = prompt.removeprefix("'<|user|>").removesuffix("=<|assistant|>'").partition("+")
        assert answer == f"'{int(a) + int(b)}<eos>'"
        assert shown[3].startswith("loss of 3 held-out samples: ")  # 2 % of 144 rows
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.dry-run"]
    routers = load_file(tmp_path / "out.dry-run/routers.safetensors")
    assert routers and not any(w.any() for w in routers.values())
    ids = [3, 40, 41, 5]
    dense = load_base(base_dir, torch.float32)(torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(reference_logits(load_reference(tmp_path / "out.dry-run"), ids, 2), dense)
    assert train(base_dir, data_file, out) == 0
    assert load_file(out / "routers.safetensors").keys() >= routers.keys()


def test_the_loss_shown_is_that_of_the_base_model(base_dir, data_file, tmp_path, capsys):
    """The one that a real run reports as dense."""
    assert train(base_dir, data_file, tmp_path / "out", "--dry-run") == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss of 3"))
    assert train(base_dir, data_file, tmp_path / "out") == 0
    log = json.loads((tmp_path / "out/trainer_log.json").read_text())
    assert f": {log['held_out']['dense_loss']:.3f}, " in shown


def test_what_is_wrong_is_said_as_in_a_real_run(base_dir, data_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(base_dir, data_file, out, "--dry-run", "--layers", "2-9") == 2
    assert "out of range" in one_error(capsys)
    (tmp_path / "out.dry-run").mkdir()
    (tmp_path / "out.dry-run/thesis.txt").write_text("mine")
    assert train(base_dir, data_file, out, "--dry-run") == 2
    assert "out.dry-run: exists already" in one_error(capsys)
    assert (tmp_path / "out.dry-run/thesis.txt").read_text() == "mine"


def test_turns_between_answers_are_told_apart_and_long_texts_shortened(tokenizer):
    text = "ab<|assistant|>cdx" + "y" * 2000
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [-100] * 3 + ids[3:4] + [-100] + ids[5:]
    first, *lines = describe_sample({"input_ids": ids, "labels": labels, "prompt_len": 3}, tokenizer)
    assert "2006 tokens; decisions are taken from its first 3," in first
    assert lines[:3] == ["  prompt | 'ab<|assistant|>'", "  answer | 'c'", "  turn   | 'd'"]
    assert lines[3].startswith("  answer | 'xyyy") and " … " in lines[3] and len(lines[3]) < 700
