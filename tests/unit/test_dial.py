"""A request's own dial: what it may say, what it gets, and the words of a refusal."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mod.calibration import Calibration, OperatingPoint
from vllm_mod.config import ConfigError, ModConfig, logit
from vllm_mod.dial import requested_cutoffs, ways_to_ask

CONFIG = ModConfig(version=2, granularity="attn_sequence", layers=(2, 5), window=8, cutoff=3.5)
TABLE = Calibration(operating_points=[OperatingPoint(target=0.5, kept=0.5, cutoff=(40.0, 41.0))])


@pytest.mark.parametrize("extra_args", [None, {}, {"kv_transfer_params": {}}, {"model": "x", "modest": 3, "mod": 1}])
def test_other_arguments_are_somebody_elses(extra_args):
    assert requested_cutoffs(extra_args, CONFIG, TABLE) is None
    assert requested_cutoffs(extra_args, ModConfig(version=1, granularity="mlp_static", layers=(1,)), None) is None


@given(st.floats(0, 1))
def test_a_threshold_is_for_all_layers(threshold):
    found = requested_cutoffs({"mod_threshold": threshold, "other": 1}, CONFIG, None)
    assert found == (logit(threshold),) * 2


@pytest.mark.parametrize(
    ("asked", "cutoff"),
    [({"mod_threshold": 0}, -math.inf), ({"mod_threshold": 1}, math.inf), ({"mod_kept": 1}, -math.inf),
     ({"mod_kept": 0}, math.inf), ({"mod_kept": 1.0}, -math.inf), ({"mod_kept": 0.0}, math.inf)],
)  # fmt: skip
@pytest.mark.parametrize("table", [None, TABLE, Calibration()])
def test_the_ends_are_exact_and_need_no_table(asked, cutoff, table):
    assert requested_cutoffs(asked, CONFIG, table) == (cutoff, cutoff)


def test_a_kept_ratio_is_looked_up():
    assert requested_cutoffs({"mod_kept": 0.5}, CONFIG, TABLE) == (40.0, 41.0)


V1 = ModConfig(version=1, granularity="attn_sequence", layers=(2, 5))
TOKEN = ModConfig(version=2, granularity="attn_token", layers=(2, 5))
STATIC = ModConfig(version=2, granularity="block_static", layers=(2, 5))


@pytest.mark.parametrize(
    ("asked", "config", "table", "said"),
    [
        *(
            ({key: value}, CONFIG, TABLE, f"key '{key}': a number from 0 to 1 is needed")
            for key in ("mod_threshold", "mod_kept")
            for value in (-0.1, 1.1, math.nan, math.inf, "0.5", True, None, [0.5], {"a": "\n" * 99}, 10**400)
        ),
        ({"mod_treshold": 0.5}, CONFIG, TABLE, "key 'mod_treshold' is unknown; known: 'mod_threshold', 'mod_kept'"),
        ({"mod_kept": 0.5, "mod_x": 1}, CONFIG, TABLE, "key 'mod_x' is unknown"),
        ({"mod_kept": 0.5, "mod_threshold": 0.5}, CONFIG, TABLE, "keys 'mod_threshold' and 'mod_kept'"),
        ({"mod_kept": 0.5}, CONFIG, None, "key 'mod_kept': this model has no calibrated table"),
        ({"mod_kept": 0.6}, CONFIG, TABLE, "key 'mod_kept': kept ratio 0.6 is not in the calibrated table"),
        ({"mod_kept": 0.5}, V1, TABLE, "key 'mod_kept': this model has no decision window"),
        ({"mod_threshold": 0.5}, TOKEN, None, "no dial (attn_token, see key 'window'"),
        ({"mod_threshold": 0}, STATIC, None, "no dial (block_static, see key 'window'"),
    ],
)
def test_refusals_name_the_key_in_one_line(asked, config, table, said):
    with pytest.raises(ConfigError) as error:
        requested_cutoffs(asked, config, table)
    message = str(error.value)
    assert said in message and "\n" not in message and len(message) < 250


def test_ways_to_ask():
    point = TABLE.operating_points[0]
    assert ways_to_ask(point, CONFIG) == ['"vllm_xargs": {"mod_kept": 0.5}']
    assert ways_to_ask(point, V1) == ["router-tuning calibrate CKPT --data D --target-capacity 0.5"]
    point = OperatingPoint(target=0.5, kept=0.5, threshold=(0.25, 0.75), cutoff=(-1.0, 1.0))
    knob = """--additional-config '{"mod": {"threshold": [0.25, 0.75]}}'"""
    assert ways_to_ask(point, V1) == [knob]
    assert ways_to_ask(point, CONFIG) == [knob, '"vllm_xargs": {"mod_kept": 0.5}']


def test_it_needs_no_vllm():
    code = "import sys, vllm_mod.dial; assert not {'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
