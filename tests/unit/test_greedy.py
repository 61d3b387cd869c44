"""`benchmarks.greedy`: how far answers agree with the dense model's, and whether they end in a loop."""

from pathlib import Path

import pytest

from benchmarks.greedy import agreed, compare, parse_args, repeating

DENSE = [[1, 2, 3, 4], [5, 6]]


def test_tokens_before_the_first_difference() -> None:
    assert agreed([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert agreed([1, 2, 3, 4], [1, 9, 3, 4]) == 0.25  # what agrees behind it is chance
    assert agreed([1, 2, 3, 4], [1, 2]) == 0.5
    assert agreed([1, 2], [1, 2, 3]) == 1
    assert agreed([1, 2], [3, 2]) == 0


def test_rows_are_paired_with_the_routed_ones() -> None:
    rows = compare({"dense": DENSE, "routed": [[1, 2, 9], [5, 6]], "static": [[1, 9], [5, 9]]})
    assert set(rows) == {"routed", "static"}
    assert rows["routed"]["agreed"] == 0.75 and rows["routed"]["identical"] == 0.5
    assert rows["routed"]["agreed_above_routed"] == rows["routed"]["agreed_above_routed_standard_error"] == 0
    assert rows["static"]["agreed"] == 0.375 and rows["static"]["identical"] == 0
    assert rows["static"]["agreed_above_routed"] == -0.375
    assert rows["static"]["agreed_above_routed_standard_error"] == 0.125


def test_loops_at_the_end() -> None:
    other = list(range(100, 120))
    assert repeating(other + [7] * 24)
    assert not repeating(other + [7] * 23)
    assert not repeating([7] * 24 + [8])  # it found the way out
    assert repeating([1, 2, 3] * 8) and not repeating([1, 2, 3] * 7)
    assert repeating(other + (list(range(16)) * 4)[5:-6])  # where a loop begins and ends is all the same
    assert not repeating(list(range(16)) * 2)  # twice is none
    assert not repeating(list(range(17)) * 3)  # nor is a paragraph
    assert not repeating([])


def test_loops_are_paired_with_the_dense_ones() -> None:
    loop, none = [7] * 30, list(range(30))
    rows = compare({"dense": [loop, none, none, none], "routed": [loop, loop, none, none]})
    assert rows["routed"]["repeating"] == 0.5 and rows["routed"]["repeating_above_dense"] == 0.25
    assert rows["routed"]["repeating_above_dense_standard_error"] == 0.25


def test_sampled_answers_are_compared_by_loops_alone() -> None:
    """Whether two draws agree says nothing."""
    answers = {"dense": [[7] * 30, [1]], "routed": [[7] * 30, [2]]}
    (row,) = compare(answers, sampled=True).values()
    assert row == {name: value for name, value in compare(answers)["routed"].items() if name.startswith("repeating")}
    assert row["repeating"] == 0.5


@pytest.mark.parametrize(
    "more", [["--tokens", "0"], ["--samples", "1"], ["--temperature", "-1"], ["--repetition-penalty", "0"]]
)
def test_what_cannot_be(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([str(Path("c")), "--model", "m", "--data", "d", *more])
    assert "error: --" in capsys.readouterr().err
