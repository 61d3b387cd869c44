"""Two processes (gloo, on the CPU) do what one does: they measure, stop, save and resume together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from router_tuning import states
from router_tuning.evaluation import share
from tests.support.measure import measure
from tests.support.models import tiny_model
from tests.support.processes import run_together
from tests.unit.training.test_trainer import FAST, routers_of, train


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 4, 18, 21])
def test_every_sample_counts_once_in_batches_that_do_not_depend_on_the_processes(samples, processes):
    parts = [list(share(samples, 4, process, processes)) for process in range(processes)]
    assert len({len(part) for part in parts}) == 1  # all take part in every round
    counted = sorted((list(batch) for part in parts for batch, counts in part if counts))
    assert counted == [list(range(i, min(i + 4, samples))) for i in range(0, samples, 4)]


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory) -> Path:
    """Rows of very different lengths, a number of them that no batch divides."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": "x" * (1 + i % 7), "completion": "y" * (1 + 3 * i % 19)} for i in range(18)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_processes_measure_what_one_does(base_dir, few_rows, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "head_dim": 16}
    moe = tiny_model(tmp_path / "moe", "olmoe", **experts)
    asked = [(base_dir, "attn_sequence"), (base_dir, "mlp_token"), (moe, "expert_token")]
    argv = ["-m", "tests.support.measure", str(few_rows), str(tmp_path), *(str(x) for pair in asked for x in pair)]
    for code, output in run_together(argv, 2):
        assert code == 0, output
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    for (base, granularity), together in zip(asked, results[0], strict=True):
        alone = measure(base, few_rows, granularity)
        assert (alone.pop("processes"), together.pop("processes")) == (1, 2)
        for name in ("loss", "perplexity"):
            assert together.pop(name) == pytest.approx(alone.pop(name), rel=1e-9), granularity
        assert together == alone and 0 < alone["kept"] < 1, granularity


@pytest.mark.slow
def test_two_processes_stop_save_and_resume_together(base_dir, data_file, tmp_path):
    """Ctrl-C reaches one of them; batches of 4 in two processes are those of 8 in one."""
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    flags = [*FAST, "--window", "none", "--per-device-train-batch-size", "4", "--save-steps", "100"]
    argv = ["train", "--model", str(base_dir), "--data", str(data_file), "--output", str(out), *flags]
    for code, output in run_together(["-m", "tests.support.interrupted_train", "1", "3", *argv], 2):
        assert code == 130 and "Traceback" not in output, output
    state, left_out = states.newest_whole(run_dir)
    assert state == run_dir / "checkpoint-3" and not left_out and states.processes_of(state) == 2
    assert {"rng_state_0.pth", "rng_state_1.pth", "average.0.safetensors"} < {path.name for path in state.iterdir()}
    assert train(base_dir, data_file, out, *flags[-6:], "--resume") == 2  # alone
    for code, output in run_together(["-m", "router_tuning", *argv, "--resume"], 2):
        assert code == 0, output
    assert not run_dir.exists()
    assert train(base_dir, data_file, tmp_path / "alone", "--window", "none") == 0
    alone, together = (json.loads((tmp_path / n / "trainer_log.json").read_text()) for n in ("alone", "out"))
    assert [s["step"] for s in together["steps"]] == list(range(1, 9))
    for one, two in zip(alone["steps"][:2], together["steps"][:2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3) and two["kept"] == one["kept"]
        assert two["scale"] == pytest.approx(one["scale"], rel=0.1)  # a mean of roots of means
    assert all(w.isfinite().all() for w in routers_of(out).values())
    assert not torch.equal(*routers_of(out).values())
