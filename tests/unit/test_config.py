"""The `mod_config` object: what is accepted, what is refused and in which words."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mod.config import (
    ConfigError,
    ModConfig,
    default_layers,
    logit,
)
from vllm_mod.granularity import GRANULARITIES

GOOD = {"version": 1, "granularity": "attn_sequence", "layers": [2, 3]}


def parse(**changes):
    return ModConfig.parse(GOOD | changes, "ckpt/config.json: mod_config")


@st.composite
def configs(draw, versions=(1, 2)):
    layers = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=12)))
    version, granularity = draw(st.sampled_from(versions)), draw(st.sampled_from(GRANULARITIES))
    share = st.floats(0, 1)

    def one_or_each(numbers):
        return draw(numbers | st.lists(numbers, min_size=len(layers), max_size=len(layers)))

    settings = {"threshold": one_or_each(share)}
    if version == 2 and not granularity.endswith("static") and draw(st.booleans()):
        settings = {"cutoff": one_or_each(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9))}
    if version == 2 and granularity.endswith("sequence"):
        settings["window"] = draw(st.none() | st.integers(1, 10**6))
    if version == 2 and not granularity.startswith("expert"):
        settings["patch"] = draw(st.none() | st.integers(0, 4096).map(lambda rank: {"rank": rank}))
    return ModConfig(
        version=version,
        granularity=granularity,
        layers=layers,
        target_capacity=draw(st.none() | share),
        base_model=draw(st.none() | st.text(max_size=20)),
        **settings,
    )


@given(configs())
def test_round_trip_through_json(config):
    written = json.dumps(config.to_dict())
    again = ModConfig.parse(json.loads(written), "test")
    if config.is_static:  # a static checkpoint has no threshold to write
        assert "threshold" not in config.to_dict()
        config = config.model_copy(update={"threshold": 0.5})
    assert again == config
    assert json.dumps(again.to_dict()) == written


@given(configs(versions=[1]))
def test_version_1_is_written_as_ever(config):
    written = {"version": 1, "granularity": config.granularity, "layers": list(config.layers)}
    if not config.is_static:
        written["threshold"] = list(config.threshold) if isinstance(config.threshold, tuple) else config.threshold
    for key in ("target_capacity", "base_model"):
        if getattr(config, key) is not None:
            written[key] = getattr(config, key)
    assert json.dumps(config.to_dict()) == json.dumps(written)


@given(configs())
def test_one_limit_and_one_cutoff_per_layer(config):
    assert len(config.limits) == len(config.cutoffs) == len(config.layers)
    if config.criterion == "cutoff":
        assert config.cutoffs == config.limits and config.threshold is None
    else:
        assert config.cutoffs == tuple(map(logit, config.limits)) and config.cutoff is None


@given(configs(), st.floats(0, 1), st.floats(-1e6, 1e6))
def test_other_limits_leave_the_rest(config, threshold, cutoff):
    def rest(of):
        return {k: v for k, v in of.to_dict().items() if k not in ("version", "threshold", "cutoff")}

    if config.is_static:
        return
    by_threshold, by_cutoff = config.with_threshold(threshold), config.with_cutoff(cutoff)
    assert by_threshold.limits == (threshold,) * len(config.layers) and by_threshold.criterion == "threshold"
    assert by_cutoff.limits == (cutoff,) * len(config.layers) and by_cutoff.criterion == "cutoff"
    assert (by_threshold.version, by_cutoff.version) == (config.version, 2)
    assert rest(by_threshold) == rest(by_cutoff) == rest(config)


def test_only_three_keys_are_required():
    config = parse()
    assert config.limits == (0.5, 0.5)
    assert config.cutoffs == (0.0, 0.0)
    assert config.target_capacity is None
    assert config.to_dict() == GOOD | {"threshold": 0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tresholds": 0.5}, ["unknown key 'tresholds'", "Known keys: version, granularity, layers, threshold"]),
        ({"version": 3}, ["'version'", "1 or 2"]),
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


BAD_VERSION_2 = [
    ({"version": 1, "cutoff": 1.5}, ["key 'cutoff' needs 'version' 2"]),
    ({"version": 1, "window": 4}, ["key 'window' needs 'version' 2"]),
    ({"version": 1, "patch": {"rank": 4}}, ["key 'patch' needs 'version' 2"]),
    *(({"cutoff": value}, ["key 'cutoff'", "finite"]) for value in (math.nan, math.inf, -math.inf, 10**400)),
    *(({"cutoff": value}, ["key 'cutoff'", "a number, or a list"]) for value in ("1", True, {}, [None, 1], [1, "2"])),
    ({"cutoff": [0.5, math.inf]}, ["key 'cutoff'", "finite"]),
    ({"cutoff": [0.5]}, ["'cutoff' lists 1 numbers for 2 routed layers"]),
    ({"cutoff": []}, ["'cutoff' lists 0 numbers for 2 routed layers"]),
    ({"cutoff": 1.5, "threshold": 0.5}, ["'threshold' and 'cutoff'", "give one"]),
    ({"cutoff": 1.5, "granularity": "mlp_static"}, ["key 'cutoff' needs routers", "mlp_static has none"]),
    *(({"window": value}, ["key 'window'", "1 or more"]) for value in (0, -1, 4.0, "4", True, [4], math.nan)),
    *(
        ({"window": 4, "granularity": name}, ["key 'window' needs a granularity *_sequence", f"'{name}'"])
        for name in GRANULARITIES
        if not name.endswith("sequence")
    ),
    ({"patch": {}}, ["key 'patch.rank' is required"]),
    ({"patch": 4}, ["key 'patch'"]),
    ({"patch": "none"}, ["key 'patch'"]),
    ({"patch": {"rank": 4, "rnk": 4}}, ["unknown key 'patch.rnk'"]),
    ({"patch": {"rank": -1}}, ["key 'patch.rank'", "greater than or equal to 0"]),
    *(({"patch": {"rank": value}}, ["key 'patch.rank'", "integer"]) for value in (4.0, "4", True, None, [4])),
    ({"patch": {"rank": 4}, "granularity": "expert_token"}, ["key 'patch': expert_token has none"]),
]


@pytest.mark.parametrize(("changes", "said"), BAD_VERSION_2)
def test_bad_version_2_keys_are_named_in_one_line(changes, said):
    with pytest.raises(ConfigError) as error:
        parse(**{"version": 2} | changes)
    message = str(error.value)
    assert "\n" not in message
    for part in ["ckpt/config.json: mod_config", *said]:
        assert part in message


def test_version_2_without_its_keys_means_the_same():
    config = parse(version=2)
    assert config.to_dict() == GOOD | {"version": 2, "threshold": 0.5}
    assert (config.cutoffs, config.window, config.patch) == ((0.0, 0.0), None, None)
    assert parse(version=2, cutoff=None, window=None, patch=None) == config


def test_a_window_may_be_larger_than_any_prompt():
    assert parse(version=2, window=10**9).window == 10**9


@pytest.mark.parametrize("granularity", ["attn_static", "mlp_static", "block_static", "attn_token", "mlp_token"])
def test_patches_need_no_sequence(granularity):
    config = parse(version=2, granularity=granularity, patch={"rank": 0})
    assert config.patch.rank == 0
    assert config.to_dict()["patch"] == {"rank": 0}


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


def test_the_schema_imports_neither_vllm_nor_torch():
    code = "import sys, vllm_mod.knobs, vllm_mod.cli; assert not {'vllm', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
