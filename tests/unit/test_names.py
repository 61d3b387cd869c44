"""Slots by request id: a slot changes hands, a request comes back under another slot, or its id is used again."""

import pytest

from vllm_mod.kv.messages import NewPages, Start, StepMessage
from vllm_mod.names import SlotNames


def message(*starts: tuple[str, int], freed: tuple[int, ...] = ()) -> StepMessage:
    return StepMessage([Start(slot, 1, 4, name=name) for name, slot in starts], NewPages.none(1), list(freed))


def test_slots_of_running_requests() -> None:
    names = SlotNames()
    names.begin(message(("a", 1), ("b", 2)))
    assert names.slots(["b", "a"]).tolist() == [2, 1]
    names.begin(message(("c", 1), freed=(1,)))  # in one step: `a` has ended, and `c` has its slot
    assert names.slots(["c", "b"]).tolist() == [1, 2]
    with pytest.raises(KeyError):
        names.slots(["a"])


def test_a_request_that_was_preempted() -> None:
    names = SlotNames()
    names.begin(message(("a", 1)))
    names.begin(message(("a", 3)))  # its old slot is named as free a step later
    names.begin(message(("b", 1), freed=(1,)))
    assert names.slots(["a", "b"]).tolist() == [3, 1]
    names.begin(message(freed=(1, 3)))
    assert not names._slots and not names._names  # nothing is kept of who has left


def test_rows_are_named_for_the_forward_that_was_prepared() -> None:
    from types import SimpleNamespace

    from vllm_mod.names import naming

    told: list[list[str]] = []

    class Stock:
        model = SimpleNamespace(routing=SimpleNamespace(name_rows=told.append))

        def prepare_attn(self, input_batch: SimpleNamespace, mode: int) -> int:
            assert not told  # the metadata, and with it the step, is made first
            return mode

    assert naming(Stock)().prepare_attn(SimpleNamespace(req_ids=["a", "b"]), 7) == 7
    assert told == [["a", "b"]]
