"""vLLM's sleep mode without a GPU: what is not kept through a sleep is overwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

from .graphs import tensors_of

#: NaN in every float type. A KV cache is allowed no NaN: kernels multiply what lies behind a request's end by 0.
NAN, LARGE = 0xFF, 0x7B


class _Pool(TorchDispatchMode):
    """Memory that is allocated inside, if no other pool is entered meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = True
        self.memory: dict[int, Tensor] = {}  #: bytes, by address

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        taken = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs)) if not t.is_meta}
        for tensor in tensors_of(result) if self.entered else ():
            storage = tensor.untyped_storage()
            if not tensor.is_meta and storage.nbytes() and storage.data_ptr() not in taken:
                self.memory[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
        return result


class Pools(SleepModeBackend):
    """Stand-in for the allocator that vLLM's `cumem` backend asks, by the same tags."""

    def __init__(self) -> None:
        super().__init__()
        self._by_tag: dict[str, _Pool] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def use(self, tag: str) -> Iterator[None]:
        outer = [pool for pool in self._by_tag.values() if pool.entered]
        pool = self._by_tag.setdefault(tag, _Pool())
        for other in outer:
            other.entered = False
        pool.entered = True
        try:
            with pool:
                yield
        finally:
            pool.entered = False
            for other in outer:
                other.entered = True

    def suspend(self, level: int = 1) -> None:
        kept = ("runtime", "cudagraph") if level == 2 else ("weights", "runtime", "cudagraph")
        for tag in kept:
            pool = self._by_tag.get(tag)
            self._kept += [(memory, memory.clone()) for memory in pool.memory.values()] if pool else []
        self.discard(tuple(self._by_tag))

    def resume(self, tags: list[str] | None = None) -> None:
        for memory, content in self._kept:
            memory.copy_(content)
        self._kept = []

    def discard(self, tags: tuple[str, ...]) -> None:
        for tag in tags:
            for memory in self._by_tag[tag].memory.values():
                memory.fill_(LARGE if tag == "kv_cache" else NAN)
