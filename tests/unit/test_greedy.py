"""`benchmarks.greedy`: how far answers agree with the dense model's."""

from pathlib import Path

import pytest

from benchmarks.greedy import agreed, compare, parse_args

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


@pytest.mark.parametrize(
    "more", [["--tokens", "0"], ["--samples", "1"], ["--others", "a/dense"], ["--others", "a", "b/a"]]
)
def test_what_cannot_be(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([str(Path("c")), "--model", "m", "--data", "d", *more])
    assert "error: --" in capsys.readouterr().err
