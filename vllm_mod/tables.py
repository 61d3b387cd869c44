"""Page tables of running requests, on the device, at one address for as long as the KV cache lives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kv.messages import NewPages
from .rows import upload_together


@dataclass(frozen=True)
class Layout:
    """Where the attention layers of a model keep their KV."""

    names: list[str]  #: attention layers, in the order of the model
    columns: list[int]  #: page column of each: its own, or 0 where a page holds all layers

    @property
    def width(self) -> int:
        """`G`: pages per token block."""
        return max(self.columns) + 1


class PageTables:
    """`[G, S, B]` pages: of page column, slot and token block. What was never told is page 0, which is nobody's."""

    def __init__(self, layout: Layout, slots: int, blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.pages = torch.zeros(layout.width, slots, blocks, dtype=torch.int32, device=device)

    def update(self, new: NewPages) -> None:
        if not len(new.counts):
            return
        slots = new.slots.repeat(new.counts)
        before = new.counts.cumsum() - new.counts
        blocks = np.arange(len(slots)) + (new.firsts - before).repeat(new.counts)
        where, block, pages = upload_together(self.pages.device, slots, blocks, new.pages)
        self.pages[:, where, block] = pages.T

    def of(self, slots: Tensor, blocks: int) -> Tensor:
        """The first `blocks` pages of each request, `[G, R, blocks]`; slots: int64 `[R]`."""
        return self.pages[:, :, :blocks].index_select(1, slots)
