"""Turn a stock `self_attn` or `mlp` into one that runs on the rows that keep it.

The sub-module's `__class__` becomes a generated subclass (as PyTorch's `fully_shard` does), so parameter names,
quantisation and tensor parallelism stay as they are. Its body is one opaque op: torch.compile sees a static shape,
and the row count may change inside.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from .compat import layer_name_encoder, leave_out_final_all_reduce, module_finder, with_own_kernel
from .config import ConfigError
from .decode import DecodeStep
from .kept import ALL, Kept
from .patch import Patch
from .routing import Routing
from .rows import Subset, attending
from .step import Route, Step

_library = Library("vllm_mod", "FRAGMENT")
_encode, _module_of = layer_name_encoder(), module_finder()


def routed_attention(positions: Tensor, hidden_states: Tensor, output: Tensor, layer_name: LayerNameType) -> None:
    _module_of(layer_name).run(output, positions, hidden_states)


def routed_mlp(hidden_states: Tensor, output: Tensor, layer_name: LayerNameType) -> None:
    _module_of(layer_name).run(output, hidden_states)


def _fake(*args: Any) -> None:
    return None


for _op in (routed_attention, routed_mlp):
    direct_register_custom_op(_op.__name__, _op, mutates_args=["output"], fake_impl=_fake, target_lib=_library)


class _Routed:
    """Shared by both kinds; `Stock` is the class the sub-module was built as."""

    Stock: type[nn.Module]
    with_attention: bool
    route: Route
    routing: Routing
    name: str
    patch: Patch | None  #: what a row that skips adds instead
    #: what the output goes through here instead of in the decoder layer, so that a patch does not
    post_norm: nn.Module | None = None
    reduce_after: bool  #: the stock all-reduce was taken out, `run` does it on the full batch

    def run(self, output: Tensor, *inputs: Tensor) -> None:
        """Fill `output` `[tokens, hidden]`: the sublayer's on kept rows, the patch or zero elsewhere."""
        step = self.routing.step
        if step is not None and step.decode is not None and not self.routing.policy.by_experts:
            self._decode(step.decode, output, *inputs)
        else:
            self._compact(step, output, *inputs)

    def _on_all_rows(self, output: Tensor) -> None:
        """What remains of the stock sublayer once rows that skip are zero."""
        if self.reduce_after:
            # Only now, on all rows: ranks can never wait for each other, whatever each of them kept.
            output.copy_(tensor_model_parallel_all_reduce(output))
        if self.post_norm is not None:
            output.copy_(self.post_norm(output))

    def _compact(self, step: Step | None, output: Tensor, *inputs: Tensor) -> None:
        x = inputs[-1]
        if step is None or self.routing.policy.by_experts:  # each expert decides, see `experts`
            kept = ALL
        else:
            kept = step.kept(self.route, x, self.with_attention, self.routing.policy.whole_block)
        if kept.all:
            output.copy_(self.stock_forward(*inputs))  # type: ignore[attr-defined]
        else:
            output.zero_()
            if kept.subset is not None:
                output.index_copy_(0, kept.subset.tokens, self._kept_rows(kept.subset, *inputs))
        self._on_all_rows(output)
        if self.patch is not None and not kept.all:
            assert step is not None
            _add_patch(self.patch, kept, step.rows.num_tokens, x, output)
        if kept.undecided is not None:
            _replace_skipped(self.patch, *kept.undecided, x, output)

    def _decode(self, step: DecodeStep, output: Tensor, *inputs: Tensor) -> None:
        """At static shapes, see `decode`. A skipped row's attention is undefined, so it is replaced, not multiplied."""
        follows = self.routing.policy.whole_block and not self.with_attention
        keep = step.keep(self.route) if follows else step.decide(self.route, inputs[-1])
        rows = len(keep)
        result = self.masked_stock_forward(step, *inputs)  # type: ignore[attr-defined]
        output[rows:].zero_()
        torch.where(keep[:, None], result[:rows], step.buffers.zero, out=output[:rows])
        self._on_all_rows(output)
        if self.patch is not None:
            torch.where(keep[:, None], output[:rows], self.patch(inputs[-1][:rows]), out=output[:rows])

    def _kept_rows(self, kept: Subset, *inputs: Tensor) -> Tensor:
        """The sublayer's output on `kept.tokens`."""
        if self.routing.whole_batch_linears:
            return self.masked_forward(kept, *inputs)[kept.tokens]  # type: ignore[attr-defined]
        return self.subset_forward(kept, *(i.index_select(0, kept.tokens) for i in inputs))  # type: ignore[attr-defined]


def _add_patch(patch: Patch, kept: Kept, number: int, x: Tensor, output: Tensor) -> None:
    """To the rows of `number` in all that skip; after the all-reduce, so that it is added once."""
    if kept.subset is None:
        output[:number] = patch(x[:number])
    else:
        others = kept.subset.others
        output.index_copy_(0, others, patch(x[others]))


def _replace_skipped(patch: Patch | None, rows: Tensor, keep: Tensor, x: Tensor, output: Tensor) -> None:
    """Those of `rows`, int64 `[m]`, that do not `keep`, bool `[m]`: they were computed before the host could know."""
    found = output.index_select(0, rows)
    instead = torch.zeros_like(found) if patch is None else patch(x.index_select(0, rows))
    output.index_copy_(0, rows, torch.where(keep[:, None], found, instead))


class _RoutedAttention(_Routed):
    with_attention = True
    kv_module: list[Attention]  #: in a list: the module has its parent already

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        output = torch.empty_like(hidden_states)
        torch.ops.vllm_mod.routed_attention(positions, hidden_states, output, _encode(self.name))
        return output

    def stock_forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return self.Stock.forward(self, positions=positions, hidden_states=hidden_states)

    def subset_forward(self, kept: Subset, positions: Tensor, hidden_states: Tensor) -> Tensor:
        name, step = self.route.kv_layer, self.routing.step
        assert name is not None and step is not None
        with attending(get_forward_context(), name, *step.contexts_of(name, kept)):
            return self.stock_forward(positions, hidden_states)

    def masked_stock_forward(self, step: DecodeStep, positions: Tensor, hidden_states: Tensor) -> Tensor:
        name, metadata = self.route.kv_layer, get_forward_context().attn_metadata
        if hidden_states.device.type == "cpu":
            metadata[name] = step.rebuilt(name)  # type: ignore[arg-type]
        return self.stock_forward(positions, hidden_states)

    def masked_forward(self, kept: Subset, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Linears on the whole batch, only the attention between them on the kept rows."""
        with _on_rows(self.kv_module[0], kept.tokens):
            return self.subset_forward(kept, positions, hidden_states)


class _RoutedMLP(_Routed):
    with_attention = False

    def forward(self, x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        torch.ops.vllm_mod.routed_mlp(x, output, _encode(self.name))
        return output

    def stock_forward(self, x: Tensor) -> Tensor:
        return self.Stock.forward(self, x)

    def subset_forward(self, kept: Subset, x: Tensor) -> Tensor:
        return self.stock_forward(x)

    def masked_stock_forward(self, step: DecodeStep, x: Tensor) -> Tensor:
        return self.stock_forward(x)

    masked_forward = subset_forward


@contextmanager
def _on_rows(attention: Attention, tokens: Tensor) -> Iterator[None]:
    """Meanwhile `attention` gets only these rows of q, k and v; its output is zero elsewhere."""
    number = 0

    def narrow(_: nn.Module, qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal number
        number = len(qkv[0])
        return tuple(t[tokens] for t in qkv)

    def widen(_: nn.Module, qkv: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.new_zeros(number, output.shape[-1]).index_copy_(0, tokens, output)

    hooks = attention.register_forward_pre_hook(narrow), attention.register_forward_hook(widen)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def _routed_class(kind: type, stock: type) -> type:
    return type(f"Routed{stock.__name__}", (kind, stock), {"Stock": stock})


def swap_class(module: nn.Module, kind: type) -> None:
    """Put `kind` before the class that `module` was built as."""
    stock: Any = type(module)
    module.__class__ = _routed_class(kind, stock)


def route_attention(
    module: nn.Module, name: str, route: Route, routing: Routing, forward_context: dict[str, Any]
) -> None:
    """Route a decoder layer's attention; raises ConfigError if it is not one plain attention."""
    kv_layers = [m for m in module.modules() if isinstance(m, Attention)]
    if len(kv_layers) != 1:
        raise ConfigError(f"{name}: {type(module).__name__} has {len(kv_layers)} attention layers, one is needed")
    _route(module, _RoutedAttention, name, route, routing, forward_context)
    route.kv_layer, module.kv_module = kv_layers[0].layer_name, kv_layers  # type: ignore[assignment]
    route.shares_rows |= get_tensor_model_parallel_world_size() > 1 and _norms_all_heads(module, kv_layers[0])


def _norms_all_heads(module: nn.Module, attention: Attention) -> bool:
    """OLMoE's q norm is over all heads, not over each: ranks all-gather their heads' rows inside the attention."""
    norm: Any = getattr(module, "q_norm", None)
    return norm is not None and norm.weight.numel() > attention.head_size


def route_mlp(module: nn.Module, name: str, route: Route, routing: Routing, forward_context: dict[str, Any]) -> None:
    _route(module, _RoutedMLP, name, route, routing, forward_context)


def _route(
    module: nn.Module, kind: type, name: str, route: Route, routing: Routing, forward_context: dict[str, Any]
) -> None:
    _use_kernels(module)
    swap_class(module, kind)
    module.name, module.route, module.routing = name, route, routing  # type: ignore[assignment]
    # A module of the router's; of a block, its attention adds it.
    patched = kind is _RoutedAttention or not routing.policy.whole_block
    module.__dict__["patch"] = route.router.patch if patched else None
    module.reduce_after = _take_out_all_reduce(module)  # type: ignore[assignment]
    forward_context[name] = module


class _PassedOn:
    """Before the class of a norm that was applied already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def norm_inside(module: nn.Module, norm: Any) -> None:
    """Let a routed sublayer's output go through `norm`, which the decoder layer applies to it, before a patch is added.

    `norm` keeps its parameters, and its place in the layer, where it does nothing from now on.
    """
    module.__dict__["post_norm"] = with_own_kernel(norm)  # they share the parameters
    swap_class(norm, _PassedOn)


def _use_kernels(module: nn.Module) -> None:
    """Give rotary embeddings, norms and activations below `module` their own kernels.

    vLLM disables these where the compiler would fuse plain operators instead, and it does not see into our op. Copies,
    because layers share rotary embeddings.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CustomOp) and not isinstance(child, FusedMoEMethodBase) and not child.enabled():
                setattr(parent, name, with_own_kernel(child))


def _take_out_all_reduce(module: nn.Module) -> bool:
    if get_tensor_model_parallel_world_size() == 1:
        return False
    reducing: list[Any] = [m for m in module.modules() if isinstance(m, RowParallelLinear) and m.reduce_results]
    for linear in reducing:
        linear.reduce_results = False
    moe: list[Any] = [m for m in module.modules() if isinstance(m, MoERunner) and not m.moe_config.is_sequence_parallel]
    for runner in moe:
        leave_out_final_all_reduce(runner)
    return bool(reducing or moe)


class Skipped(nn.Module):
    """A sublayer that a static checkpoint drops: no weights, no KV cache, adds nothing, or its patch."""

    patch: Patch | None

    def __init__(self, patch: Patch | None = None) -> None:
        super().__init__()
        self.__dict__["patch"] = patch  # a module of the router's

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden_states: Any = kwargs.get("hidden_states", args[-1] if args else None)
        return torch.zeros_like(hidden_states) if self.patch is None else self.patch(hidden_states)
