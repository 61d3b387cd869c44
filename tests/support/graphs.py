"""CUDA graphs without a GPU: a capture records tensor operators, a replay runs them again without the model's Python.

As on a GPU, a replay reads and writes the tensors of the capture: whatever is not in a buffer at one address is stale.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

#: Operators that run Python of vLLM or of the plugin; a graph holds the kernels that they launch.
OPAQUE = ("vllm", "vllm_mod")
#: What waits for the device cannot be captured.
WAITING = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Graph:
    """Stand-in for `torch.cuda.CUDAGraph`."""

    capturing: ClassVar[Graph | None] = None
    replays: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        self.kind = ""  #: FULL or PIECEWISE
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        assert Graph.capturing is None, "a capture inside a capture"
        Graph.capturing = self

    def capture_end(self) -> None:
        assert Graph.capturing is self
        Graph.capturing = None

    def replay(self) -> None:
        Graph.replays[self.kind] += 1
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for function, args, kwargs, produced in self.calls:
            again = function(*tree_map(now, args), **tree_map(now, kwargs))
            made.update(zip(map(id, produced), tensors_of(again), strict=True))
        for _, args, kwargs, produced in self.calls:
            taken = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
            for tensor in produced:  # the capture's own memory: whoever holds a result finds the new one there
                new = made[id(tensor)]
                if new.shape == tensor.shape and tensor.untyped_storage().data_ptr() not in taken:
                    tensor.copy_(new)


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, recorded as one: it stands for a kernel of its own, whatever operators it is made of on the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        graph, Graph.capturing = Graph.capturing, None
        with _disable_current_modes():
            function(*args, **kwargs)
        Graph.capturing = graph
        if graph is not None:
            graph.calls.append((function, args, kwargs, []))

    return call


class Recorder(TorchDispatchMode):
    """Gives the operators that run to the graph that is being captured, if one is.

    is_break: whether an operator of `OPAQUE` stands between two captured pieces and is run by Python at each replay.
    """

    def __init__(self, is_break: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_break = is_break

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.name().split(".")[0]
        opaque = function.namespace in OPAQUE
        if opaque and (Graph.capturing is None or not self._is_break(name)):
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        graph = Graph.capturing
        if graph is None:
            return function(*args, **kwargs)
        assert name not in WAITING, f"{name} while a graph is captured"
        Graph.capturing = None if opaque else graph
        result = function(*args, **kwargs)
        Graph.capturing = graph
        graph.calls.append((function, args, kwargs, tensors_of(result)))
        return result
