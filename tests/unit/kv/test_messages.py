"""What ranks report is joined: tensor-parallel ranks must agree, pipeline stages have layers of their own."""

import pickle

import numpy as np
import pytest

from vllm_mod.kv.messages import Report, Scored


def report(columns: tuple[int, ...], keep: list[bool] | None, sums: list[float], serial: int = 7) -> Report:
    decided = None if keep is None else np.array(keep)
    return Report(columns, {serial: Scored(0, np.array([sums]), decided)})


def test_tensor_parallel_ranks_must_agree() -> None:
    mine = report((0, 1), [True, False], [1.0, 2.0])
    assert mine.aggregate(report((0, 1), [True, False], [1.0, 2.0])) is mine
    with pytest.raises(RuntimeError, match="ranks disagree"):
        mine.aggregate(report((0, 1), [True, True], [1.0, 2.0]))
    with pytest.raises(RuntimeError, match="ranks disagree"):
        mine.aggregate(report((0, 1), None, [1.0, 2.0]))
    with pytest.raises(RuntimeError, match="different requests"):
        mine.aggregate(report((0, 1), [True, False], [1.0, 2.0], serial=8))


def test_pipeline_stages_are_joined() -> None:
    joined = report((0,), [True, True], [1.0, 0.0]).aggregate(report((1,), [True, False], [0.0, 2.0]))
    assert isinstance(joined, Report)
    assert joined.columns == (0, 1)
    assert joined.scored[7].keep.tolist() == [True, False]  # type: ignore[union-attr]
    assert joined.scored[7].sums.tolist() == [[1.0, 2.0]]


def test_stages_of_several_routed_layers_are_joined() -> None:
    first = report((0, 1), [False, True, True, True, True], [1.0, 2.0, 0.0, 0.0, 0.0])
    second = report((2, 3, 4), [True, True, False, True, False], [0.0, 0.0, 3.0, 4.0, 5.0])
    joined = first.aggregate(second)
    assert isinstance(joined, Report)
    assert joined.scored[7].keep.tolist() == [False, True, False, True, False]  # type: ignore[union-attr]
    assert joined.scored[7].sums.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]


def test_a_report_on_its_way_is_read_once_and_before_it_is_sent() -> None:
    reads: list[int] = []

    def scored() -> dict[int, Scored]:
        reads.append(1)
        return {7: Scored(0, np.zeros((1, 2)), None)}

    on_its_way = Report((0, 1), scored)
    assert not reads
    sent = pickle.loads(pickle.dumps(on_its_way))
    assert sent.columns == (0, 1) and sent.scored.keys() == on_its_way.scored.keys() == {7}
    assert len(reads) == 1
