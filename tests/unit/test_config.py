"""The `mod_config` object: what is accepted, what is refused and in which words."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mod.config import (
    ARCHITECTURES,
    GRANULARITIES,
    ConfigError,
    EngineKnobs,
    ModConfig,
    default_layers,
    logit,
    mod_architecture,
)

GOOD = {"version": 1, "granularity": "attn_sequence", "layers": [2, 3]}


def parse(**changes):
    return ModConfig.parse(GOOD | changes, "ckpt/config.json: mod_config")


@st.composite
def configs(draw):
    layers = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=12)))
    number = st.floats(0, 1)
    return ModConfig(
        version=1,
        granularity=draw(st.sampled_from(GRANULARITIES)),
        layers=layers,
        threshold=draw(number | st.lists(number, min_size=len(layers), max_size=len(layers))),
        target_capacity=draw(st.none() | number),
        base_model=draw(st.none() | st.text(max_size=20)),
    )


@given(configs())
def test_round_trip_through_json(config):
    again = ModConfig.parse(json.loads(json.dumps(config.to_dict())), "test")
    if config.is_static:  # a static checkpoint has no threshold to write
        assert "threshold" not in config.to_dict()
        config = config.model_copy(update={"threshold": 0.5})
    assert again == config


@given(configs())
def test_one_threshold_and_one_cutoff_per_layer(config):
    assert len(config.thresholds) == len(config.cutoffs) == len(config.layers)
    assert f"{config.target}_{config.level}" == config.granularity


def test_only_three_keys_are_required():
    config = parse()
    assert config.thresholds == (0.5, 0.5)
    assert config.cutoffs == (0.0, 0.0)
    assert config.target_capacity is None
    assert config.to_dict() == GOOD | {"threshold": 0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tresholds": 0.5}, ["unknown key 'tresholds'", "Known keys: version, granularity, layers, threshold"]),
        ({"version": 2}, ["'version'", "1"]),
        ({"version": "1"}, ["'version'", "1"]),
        ({"version": True}, ["'version'", "True"]),
        ({"version": 1.0}, ["'version'", "1.0"]),
        ({"granularity": "attn"}, ["'granularity'", "'attn_token'", "'block_static'", "'attn'"]),
        ({"layers": []}, ["'layers'", "at least one layer"]),
        ({"layers": 3}, ["'layers'", "a list of layer numbers"]),
        ({"layers": ["3"]}, ["'layers'", "a list of layer numbers"]),
        ({"layers": [1.0]}, ["'layers'", "a list of layer numbers"]),
        ({"layers": [True]}, ["'layers'", "a list of layer numbers"]),
        ({"layers": [3, 2]}, ["'layers'", "ascend"]),
        ({"layers": [2, 3, 3]}, ["'layers'", "listed twice: [3]"]),
        ({"layers": [-1, 3]}, ["'layers'", "layer -1 is out of range"]),
        ({"threshold": 1.5}, ["'threshold'", "from 0", "to 1"]),
        ({"threshold": math.nan}, ["'threshold'", "from 0", "nan"]),
        ({"threshold": "0.5"}, ["'threshold'", "a number"]),
        ({"threshold": True}, ["'threshold'", "a number"]),
        ({"threshold": None}, ["'threshold'", "a number"]),
        ({"threshold": [0.5]}, ["'threshold' lists 1 numbers for 2 routed layers"]),
        ({"threshold": [0.5, 2]}, ["'threshold'", "from 0"]),
        ({"target_capacity": -0.1}, ["'target_capacity'", "greater than or equal to 0"]),
        ({"target_capacity": math.nan}, ["'target_capacity'"]),
        ({"base_model": 7}, ["'base_model'", "string"]),
    ],
)
def test_bad_values_are_named_in_one_line(changes, said):
    with pytest.raises(ConfigError) as error:
        parse(**changes)
    message = str(error.value)
    assert "\n" not in message
    for part in ["ckpt/config.json: mod_config", *said]:
        assert part in message


@pytest.mark.parametrize("key", ["version", "granularity", "layers"])
def test_required_keys_are_named(key):
    with pytest.raises(ConfigError, match=f"key '{key}' is required"):
        ModConfig.parse({k: v for k, v in GOOD.items() if k != key}, "x")


@pytest.mark.parametrize("data", [None, [], "attn", 3])
def test_something_else_than_an_object(data):
    with pytest.raises(ConfigError, match=r"^x: .*dictionary"):
        ModConfig.parse(data, "x")


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError, match=r"'granularity'.*'layers'.*unknown key 'colour'"):
        parse(granularity="x", layers=[], colour="red")


def test_fit_with_the_base_model():
    parse().check_fits(num_layers=4)
    with pytest.raises(ConfigError, match="layer 3 is out of range, the model has layers 0 to 2"):
        parse().check_fits(num_layers=3)
    with pytest.raises(ConfigError, match="'expert_token' needs experts, and this model is dense"):
        parse(granularity="expert_token").check_fits(num_layers=4)
    parse(granularity="expert_token").check_fits(num_layers=4, num_experts=8)


def test_logit_ends_are_exact():
    assert logit(0) == logit(0.0) == -math.inf
    assert logit(1) == logit(1.0) == math.inf
    assert logit(0.5) == 0.0


@given(st.floats(1e-6, 1 - 1e-6))
def test_logit_is_the_inverse_of_the_sigmoid(p):
    assert 1 / (1 + math.exp(-logit(p))) == pytest.approx(p, rel=1e-9)


@given(st.integers(2, 200))
def test_default_layers_are_the_deepest_half_but_the_last(num_layers):
    layers = default_layers(num_layers)
    assert layers == list(range(layers[0], num_layers - 1))
    assert len(layers) == min(num_layers // 2, num_layers - 1)


def test_default_layers_of_the_design():
    assert default_layers(32) == list(range(15, 31))
    with pytest.raises(ConfigError, match="has none to route"):
        default_layers(1)


def test_architectures():
    for base, routed in ARCHITECTURES.items():
        assert mod_architecture(base) == mod_architecture(routed) == routed
    with pytest.raises(ConfigError, match=r"'GPT2LMHeadModel' is not supported; supported: .*LlamaForCausalLM"):
        mod_architecture("GPT2LMHeadModel")


class TestEngineKnobs:
    @pytest.mark.parametrize("additional_config", [None, {}, {"mod": {}}, {"other": 1}])
    def test_absent_knobs_change_nothing(self, additional_config):
        knobs = EngineKnobs.from_additional_config(additional_config)
        assert knobs == EngineKnobs()
        assert knobs.kv_reclaim is True
        assert knobs.apply(parse(threshold=0.3)) == parse(threshold=0.3)

    @pytest.mark.parametrize(
        ("knobs", "thresholds"),
        [
            ({"threshold": 0.7}, (0.7, 0.7)),
            ({"threshold": 0}, (0.0, 0.0)),
            ({"threshold": [0.1, 0.2]}, (0.1, 0.2)),
            ({"force": "keep"}, (0.0, 0.0)),
            ({"force": "skip"}, (1.0, 1.0)),
            ({"force": "skip", "threshold": 0.3}, (1.0, 1.0)),
        ],
    )
    def test_knobs_replace_the_thresholds(self, knobs, thresholds):
        applied = EngineKnobs.from_additional_config({"mod": knobs}).apply(parse())
        assert applied.thresholds == thresholds
        assert applied.layers == (2, 3)

    @pytest.mark.parametrize(
        ("knobs", "said"),
        [
            ({"treshold": 0.5}, "unknown key 'treshold'.*Known keys: threshold, force, kv_reclaim"),
            ({"force": "maybe"}, "key 'force'.*'keep' or 'skip'"),
            ({"kv_reclaim": "yes"}, "key 'kv_reclaim'.*boolean"),
            ({"threshold": 7}, "key 'threshold'.*from 0"),
            ({"threshold": "high"}, "key 'threshold'.*number"),
            ({"threshold": [0.1]}, "'threshold' lists 1 numbers for 2 routed layers"),
            ([], "dictionary"),
        ],
    )
    def test_bad_knobs(self, knobs, said):
        with pytest.raises(ConfigError, match=f"^--additional-config: mod: .*{said}"):
            EngineKnobs.from_additional_config({"mod": knobs}).apply(parse())

    @pytest.mark.parametrize("knobs", [{"force": "keep"}, {"threshold": 0.5}])
    def test_a_static_checkpoint_has_nothing_to_override(self, knobs):
        config = parse(granularity="attn_static")
        assert EngineKnobs().apply(config) == config
        with pytest.raises(ConfigError, match="a attn_static checkpoint has none"):
            EngineKnobs.from_additional_config({"mod": knobs}).apply(config)


def test_the_schema_imports_neither_vllm_nor_torch():
    code = "import sys, vllm_mod.config, vllm_mod.cli; assert not {'vllm', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
