"""Which rows of a forward keep a routed sublayer: all of them, none, or a proper subset."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .rows import Subset


@dataclass(frozen=True)
class Kept:
    subset: Subset | None
    all: bool = False
    #: rows among these of which only the device knows whether they keep: their numbers, int64 `[m]`, and bool `[m]`
    undecided: tuple[Tensor, Tensor] | None = None

    @property
    def none(self) -> bool:
        return self.subset is None and not self.all


ALL, NONE = Kept(None, all=True), Kept(None)
