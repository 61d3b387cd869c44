"""`--additional-config '{"mod": {...}}'`: what it changes, what is refused and in which words."""

import pytest

from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.knobs import EngineKnobs, UnderLoad

GOOD = {"version": 1, "granularity": "attn_sequence", "layers": [2, 3]}
WINDOWED = {"version": 2, "window": 8}


def parse(**changes):
    return ModConfig.parse(GOOD | changes, "ckpt/config.json: mod_config")


@pytest.mark.parametrize("additional_config", [None, {}, {"mod": {}}, {"other": 1}])
def test_absent_knobs_change_nothing(additional_config):
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
def test_knobs_replace_the_thresholds(knobs, thresholds):
    applied = EngineKnobs.from_additional_config({"mod": knobs}).apply(parse())
    assert applied.limits == thresholds
    assert applied.layers == (2, 3)


def test_knobs_replace_cutoffs():
    config = parse(version=2, cutoff=[40.0, 41.5], window=8, patch={"rank": 2})
    assert EngineKnobs().apply(config) == config
    for knobs, limit in (({"threshold": 0.7}, 0.7), ({"force": "keep"}, 0.0), ({"force": "skip"}, 1.0)):
        applied = EngineKnobs.from_additional_config({"mod": knobs}).apply(config)
        assert (applied.criterion, applied.limits) == ("threshold", (limit, limit))
        assert (applied.window, applied.patch) == (8, config.patch)


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
def test_bad_knobs(knobs, said):
    with pytest.raises(ConfigError, match=f"^--additional-config: mod: .*{said}"):
        EngineKnobs.from_additional_config({"mod": knobs}).apply(parse())


@pytest.mark.parametrize("patched", [{}, {"version": 2, "patch": {"rank": 2}}])
@pytest.mark.parametrize("knobs", [{"force": "keep"}, {"threshold": 0.5}])
def test_a_static_checkpoint_has_nothing_to_override(knobs, patched):
    config = parse(granularity="attn_static", **patched)
    assert EngineKnobs().apply(config) == config
    with pytest.raises(ConfigError, match="a attn_static checkpoint has none"):
        EngineKnobs.from_additional_config({"mod": knobs}).apply(config)


@pytest.mark.parametrize(
    ("knobs", "changes", "said"),
    [
        ({}, {}, "'under_load' needs a decision window"),
        ({"force": "keep"}, WINDOWED, "'force' answers for every request: 'under_load' has no effect; drop one"),
        ({"threshold": 0.5}, WINDOWED, "'threshold' has no effect; drop one"),
    ],
)
def test_what_a_load_policy_does_not_go_with(knobs, changes, said):
    both = EngineKnobs.from_additional_config({"mod": {"under_load": {"kept": 0.5}, **knobs}})
    with pytest.raises(ConfigError, match=said):
        both.apply(parse(**changes))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({}, "key 'under_load.kept'"),
        ({"kept": 1.5}, "key 'under_load.kept'"),
        ({"kept": 0.5, "levels": 0}, "key 'under_load.levels'"),
        ({"kept": 0.5, "kv_usage": [0.9, 0.5]}, "key 'kv_usage': two ascending numbers"),
        ({"kept": 0.5, "kv_usage": [0.5, 1.5]}, "key 'kv_usage': a share of the pages is at most 1"),
        ({"kept": 0.5, "waiting": [3, 3]}, "key 'waiting': two ascending numbers"),
        ({"kept": 0.5, "waits": [0, 3]}, "unknown key 'under_load.waits'"),
    ],
)
def test_a_bad_load_policy(policy, said):
    with pytest.raises(ConfigError, match=f"^--additional-config: mod: .*{said}"):
        EngineKnobs.from_additional_config({"mod": {"under_load": policy}})


def test_the_busier_the_fewer():
    policy = UnderLoad(kept=0.5, kv_usage=(0.5, 0.9), waiting=(0, 8), levels=4)
    assert policy.ratios == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [policy.kept_at(usage, 0) for usage in (0, 0.5, 0.55, 0.7, 0.9, 1)] == [1, 1, 0.875, 0.75, 0.5, 0.5]
    assert [policy.kept_at(0, waiting) for waiting in (0, 1, 2, 4, 8, 99)] == [1, 0.875, 0.875, 0.75, 0.5, 0.5]
    assert policy.kept_at(0.55, 8) == 0.5
