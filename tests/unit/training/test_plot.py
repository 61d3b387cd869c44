"""The picture of a run."""

from __future__ import annotations

import logging
import sys

import pytest

from router_tuning.plot import PLOT_FILE, plot_training
from vllm_mod.trainer_log import Step

STEPS = [
    Step.parse(
        {
            "step": i,
            "loss": 3.0 - i / 10,
            "kept": 1.0 - i / 20,
            "lambda": i / 100,
            "scale": 0.1,
            "kept_per_layer": {"1": 1.0, "2": 0.5},
        },
        "step",
    )
    for i in range(1, 11)
]


@pytest.mark.parametrize("number", [1, 10])
def test_a_picture_is_written(tmp_path, number):
    pytest.importorskip("matplotlib")
    assert plot_training(STEPS[:number], 0.5, tmp_path)
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO, "router_tuning"):
        assert not plot_training(STEPS, 0.5, tmp_path)
    assert 'pip install "vllm-mod[bench]"' in caplog.text
    assert not list(tmp_path.iterdir())
