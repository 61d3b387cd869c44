"""`calibration.json`: its schema, and cutoffs for kept ratios that were not calibrated."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mod.calibration import CALIBRATION_FILE, Calibration, OperatingPoint, read_calibration, write_calibration
from vllm_mod.config import ConfigError, ModConfig, logit

CONFIG = ModConfig(version=2, granularity="attn_sequence", layers=(2, 5), window=8)
TABLE = {
    "lowest_scores": [-4.0, -8.0],
    "highest_scores": [4.0, 44.0],
    "operating_points": [
        {"target": 0.75, "kept": 0.76, "cutoff": [-1.0, -2.0]},
        {"target": 0.25, "kept": 0.24, "cutoff": [1.0, 40.0]},
    ],
}


def parse(**changes) -> Calibration:
    return Calibration.parse(TABLE | changes, "test")


finite = st.floats(-1e6, 1e6)


@st.composite
def calibrations(draw):
    layers = draw(st.integers(1, 5))
    each = st.lists(finite, min_size=layers, max_size=layers)
    shares = st.floats(0, 1)
    points = [
        {"target": target, "kept": draw(shares)}
        | draw(st.sampled_from([{"cutoff": draw(finite | each)}, {"threshold": draw(shares)}]))
        for target in draw(st.lists(shares, max_size=6, unique=True))
    ]
    more = draw(st.sampled_from([{}, {"samples": 9, "per_layer": True, "kept": 0.5, "data": ["a"], "command": "x"}]))
    if draw(st.booleans()):
        more |= {"lowest_scores": draw(each), "highest_scores": draw(each)}
    return layers, Calibration.parse({"operating_points": points} | more, "test")


@given(calibrations())
def test_round_trip_through_json(made):
    _, calibration = made
    again = Calibration.parse(json.loads(json.dumps(calibration.to_dict())), "test")
    assert again == calibration


@given(calibrations(), st.floats(0, 1))
def test_any_ratio_has_cutoffs_or_an_error_that_says_which_have(made, kept):
    layers, calibration = made
    inner = [point.target for point in calibration.operating_points if 0 < point.target < 1]
    ranged = calibration.lowest_scores is not None
    if kept in (0, 1) or (inner and (ranged or min(inner) <= kept <= max(inner))):
        cutoffs = calibration.cutoffs_at(kept, layers)
        assert len(cutoffs) == layers and not any(map(math.isnan, cutoffs))
    else:
        with pytest.raises(ConfigError, match=r"^kept ratio .* is not in the calibrated table, which has .*0 and 1$"):
            calibration.cutoffs_at(kept, layers)


def test_the_ends_are_exact_with_any_table():
    for table in (parse(), Calibration()):
        assert table.cutoffs_at(1, 2) == table.cutoffs_at(1.0, 2) == (-math.inf, -math.inf)
        assert table.cutoffs_at(0, 2) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("kept", "cutoffs"),
    [
        (0.75, (-1.0, -2.0)),
        (0.25, (1.0, 40.0)),
        (0.5, (0.0, 19.0)),
        (0.65, (-0.6, 6.4)),
        (0.875, (-2.5, -5.0)),  # half-way to the lowest scores
        (0.125, (2.5, 42.0)),
    ],
)
def test_between_two_points_every_layer_is_interpolated(kept, cutoffs):
    assert parse().cutoffs_at(kept, 2) == pytest.approx(cutoffs)


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_kept_is_never_a_higher_cutoff(one, other):
    most, least = (parse().cutoffs_at(kept, 2) for kept in (max(one, other), min(one, other)))
    assert all(a <= b for a, b in zip(most, least, strict=True))


def test_a_point_beyond_the_scores_seen_is_not_gone_back_from():
    table = parse(operating_points=[{"target": 0.9, "kept": 0.9, "cutoff": [-9.0, 50.0]}])
    assert table.cutoffs_at(0.95, 2) == pytest.approx((-9.0, 21.0))
    assert table.cutoffs_at(0.45, 2) == pytest.approx((-2.5, 50.0))


def test_what_was_set_is_a_point_too():
    table = parse(target_capacity=0.5, kept=0.5, cutoff=[7.0, 8.0])
    assert table.cutoffs_at(0.5, 2) == (7.0, 8.0)
    table = parse(operating_points=[], target_capacity=0.5, kept=0.5, threshold=0.75)
    assert table.cutoffs_at(0.5, 2) == pytest.approx((logit(0.75),) * 2)


def test_tables_of_thresholds_alone():
    points = [{"target": 0.75, "kept": 0.75, "threshold": 0.4}, {"target": 0.25, "kept": 0.25, "threshold": [0.6, 1.0]}]
    table = Calibration.parse({"operating_points": points}, "test")
    assert table.cutoffs_at(0.75, 2) == (logit(0.4), logit(0.4))
    assert table.cutoffs_at(0.55, 2) == pytest.approx(
        (-0.2 * logit(0.6), logit(0.4))
    )  # nothing is half-way to infinity
    assert table.cutoffs_at(0.45, 2) == pytest.approx((0.2 * logit(0.6), math.inf))
    with pytest.raises(ConfigError, match=r"kept ratio 0.8 is not in .* from 0.25 to 0.75, 0 and 1"):
        table.cutoffs_at(0.8, 2)
    with pytest.raises(ConfigError, match=r"kept ratio 0.1 is not in"):
        table.cutoffs_at(0.1, 2)
    with pytest.raises(ConfigError, match=r"kept ratio 0.5 is not in the calibrated table, which has 0 and 1$"):
        Calibration(lowest_scores=[0.0], highest_scores=[1.0]).cutoffs_at(0.5, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"operating_point": []}, "unknown key 'operating_point'. Known keys: command, data"),
        ({"operating_points": {}}, "key 'operating_points'"),
        ({"operating_points": [{"target": 0.5}]}, "key 'operating_points.0.kept' is required"),
        ({"operating_points": [{"target": 0.5, "kept": 0.5}]}, "needs 'threshold' or 'cutoff'"),
        ({"operating_points": [{"target": 0.5, "kept": 0.5, "cutof": 1}]}, "unknown key 'operating_points.0.cutof'"),
        ({"operating_points": [{"target": 1.5, "kept": 0.5, "cutoff": 1}]}, "key 'operating_points.0.target'"),
        ({"operating_points": [{"target": 0.5, "kept": "0.5", "cutoff": 1}]}, "key 'operating_points.0.kept'"),
        ({"operating_points": [{"target": 0.5, "kept": 0.5, "cutoff": "1"}]}, "key 'operating_points.0.cutoff'"),
        ({"operating_points": [{"target": 0.5, "kept": 0.5, "threshold": 2}]}, "key 'operating_points.0.threshold'"),
        ({"operating_points": [{"target": 0.5, "kept": 0.5, "cutoff": 1}] * 2}, "listed twice: [0.5]"),
        ({"operating_points": [{"target": 0.5, "kept": 0.5, "cutoff": [1]}]}, "has 1 values per point, and mod_config"),
        ({"lowest_scores": [1.0]}, "has 1 values per point, and mod_config routes layers [2, 5]"),
        ({"lowest_scores": 1.0}, "key 'lowest_scores'"),
        ({"kept_per_layer": {"3": 0.5}}, "names layer 3, and mod_config routes layers [2, 5]"),
        ({"kept_per_layer": {"2": True}}, "key 'kept_per_layer.2'"),
        ({"samples": 0}, "key 'samples'"),
    ],
)
def test_bad_tables_are_named_in_one_line(tmp_path, change, said):
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(TABLE | change))
    with pytest.raises(ConfigError) as error:
        read_calibration(tmp_path, CONFIG)
    assert str(tmp_path / CALIBRATION_FILE) in str(error.value)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_numbers_that_json_does_not_have(tmp_path, value):
    for text in ('{"lowest_scores": [%s, 1]}', '{"standard_error": %s}', '{"kept_per_layer": {"2": %s}}'):
        (tmp_path / CALIBRATION_FILE).write_text(text % value)
        with pytest.raises(ConfigError, match="finite"):
            read_calibration(tmp_path, CONFIG)


def test_files(tmp_path):
    assert read_calibration(tmp_path, CONFIG) is None
    write_calibration(tmp_path, parse())
    assert read_calibration(tmp_path, CONFIG) == parse()
    assert json.loads((tmp_path / CALIBRATION_FILE).read_text())["operating_points"] == TABLE["operating_points"]
    (tmp_path / CALIBRATION_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"calibration\.json: cannot be read"):
        read_calibration(tmp_path, CONFIG)


def test_tables_written_before_cutoffs_were():
    old = {
        "command": "router-tuning calibrate CKPT --data d.jsonl --target-capacity 0.5", "data": ["d.jsonl"],
        "samples": 100, "per_layer": True, "target_capacity": 0.5, "kept": 0.501, "standard_error": 0.004,
        "kept_per_layer": {"2": 0.48, "5": 0.522}, "threshold": [0.51, 0.49],
        "operating_points": [{"target": 0.75, "kept": 0.7503, "threshold": [0.4, 0.41]}],
    }  # fmt: skip
    table = Calibration.parse(old, "test")
    assert table.cutoffs_at(0.75, 2) == pytest.approx((logit(0.4), logit(0.41)))
    assert OperatingPoint(target=1.0, kept=1.0, threshold=0.0).cutoffs(2) == (-math.inf,) * 2
