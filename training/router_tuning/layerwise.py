"""A model run layer by layer over all of the data: one pass, whatever depends on the layers before.

The hidden states of every batch wait in an unnamed file while a layer is worked on, so memory is that of one batch;
the file has tokens x hidden numbers of the model's dtype. What runs is the model's own forward: layers that are not
meant hand on what they get, so masks and positions are made as ever.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vllm_mod.config import ConfigError

from .data import IGNORED
from .model import architecture_of_model, decoder_layers, given_prompts
from .routing import ModelRouting, routing_of
from .sublayers import hide_skipped_keys, stock

Batch = Mapping[str, Tensor]


def requests_of(model: Any, batch: Batch) -> AbstractContextManager[ModelRouting]:
    """`given_prompts` of a batch."""
    scores = batch.get("scores")
    return given_prompts(
        model, batch["prompt_mask"].to(model.device), None if scores is None else scores.to(model.device)
    )


class HiddenStates:
    """One tensor per batch, on disk; it vanishes with the process, however that ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed in `close`)
        except OSError as error:
            raise self._full(error) from None
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0

    def put(self, number: int, states: Tensor) -> None:
        """Of batch `number`: the next one, or one that is there and keeps its shape."""
        if number == len(self._places):
            self._places.append((self._end, states.shape, states.dtype))
            self._end += states.numel() * states.element_size()
        offset, shape, dtype = self._places[number]
        assert (states.shape, states.dtype) == (shape, dtype)
        try:
            self._write(offset, states.cpu().contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._full(error) from None

    def _write(self, offset: int, data: memoryview) -> None:
        self._file.seek(offset)
        self._file.write(data)
        self._file.flush()

    def get(self, number: int) -> Tensor:
        offset, shape, dtype = self._places[number]
        self._file.seek(offset)
        data = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk left in the buffer
            self._file.close()

    def _full(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._directory}: hidden states cannot be kept: {error.strerror}; lower --max-samples")


class _HandOn(nn.Module):
    """In place of a layer, or of a sublayer: adds nothing, and notes what it gets."""

    seen: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states


@contextlib.contextmanager
def _running(model: Any, states: Tensor | None, first: int, stop: int) -> Iterator[_HandOn]:
    """While it lasts, of all layers `first` to `stop - 1` run. Yields what stands in for layer `stop` (or for none).

    states: what layer `first` gets in place of what the model would give it (not as `inputs_embeds`, which some models
    scale), if not None.
    """
    layers = decoder_layers(model)
    all_of_them, end = list(layers), _HandOn()

    def instead(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert states is not None
        given = states.to(model.device)
        return ((given, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": given})

    for index in range(len(layers)):
        if not first <= index < stop:
            layers[index] = end if index == stop else _HandOn()
    hook = None if states is None else layers[first].register_forward_pre_hook(instead, with_kwargs=True, prepend=True)
    try:
        yield end
    finally:
        if hook is not None:
            hook.remove()
        for index, layer in enumerate(all_of_them):
            layers[index] = layer


@torch.no_grad()
def advance(model: Any, batch: Batch, states: Tensor | None, first: int, stop: int) -> Tensor:
    """The hidden states before layer `stop` from those before layer `first`, or from the tokens (None, first 0).

    As the routed model has them: with its decisions, and the patches that it has by now. `[B, T, hidden]`.
    """
    with _running(model, states, first, stop) as end, requests_of(model, batch):
        _forward(model, batch)
    return end.seen


def answer_logits(
    model: Any,
    batch: Batch,
    states: Tensor | None = None,
    first: int = 0,
    cache: DynamicCache | None = None,
) -> Tensor:
    """What predicts each answer token, `[tokens, vocabulary]` in the model's precision, row by row of the batch.

    From the states before layer `first`, or from the tokens (see `advance`). cache: is filled; tokens that it has
    already are left out (`past.Past`).
    """
    begin = 0 if cache is None else cache.get_seq_length()
    answers = supervised(batch)[:, begin:].to(model.device)
    states = None if states is None else states[:, begin:]
    last = len(decoder_layers(model))

    def of_answers(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, :-1][answers],)

    with _running(model, states, first, last), requests_of(model, batch):
        hook = model.get_output_embeddings().register_forward_pre_hook(of_answers)
        try:
            return _forward(model, batch, 0, cache).logits
        finally:
            hook.remove()


def supervised(batch: Batch) -> Tensor:
    """bool `[B, T - 1]`: the places whose prediction is an answer token."""
    return batch["labels"][:, 1:] != IGNORED


@torch.no_grad()
def sublayer(model: Any, batch: Batch, states: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and F(x) of a routed layer's sublayer, `[B, T, hidden]`, and which tokens may skip it, bool `[B, T]`.

    states: the hidden states before the layer. F is what is added to these where the sublayer is kept, behind a norm of
    its own or scaled where a model does that; of `block` attention and MLP together. At token level the keys of skipped
    tokens are hidden, as they will be.
    """
    state = routing_of(model)
    module, policy = decoder_layers(model)[layer], state.config.policy
    norms = architecture_of_model(model).post_norms
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note_input(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if policy.packs_kv and not inputs:
            keep = state.decide(layer, x).keep
            kwargs = kwargs | {"attention_mask": hide_skipped_keys(kwargs.get("attention_mask"), keep, x.dtype)}
        inputs.append(x)
        return args, kwargs

    def note_output(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_running(model, states, layer, layer + 1))
        stack.enter_context(requests_of(model, batch))
        for name in policy.sublayers:
            part = getattr(module, name)
            added = getattr(module, norms[name]) if name in norms else part
            for each in {part, added}:
                stack.enter_context(stock(each))  # no decision, no patch
            stack.callback(part.register_forward_pre_hook(note_input, with_kwargs=True).remove)
            stack.callback(added.register_forward_hook(note_output).remove)
        if not policy.skips_mlp:  # the MLP's output is not needed
            stack.callback(setattr, module, "mlp", module.mlp)
            module.mlp = _HandOn()
        _forward(model, batch)
        may_skip = state.may_skip(inputs[0].shape[:2], inputs[0].device)
    return inputs[0], torch.stack(outputs).double().sum(0) * state.residual_multiplier, may_skip


def _forward(model: Any, batch: Batch, predicted: int = 1, cache: DynamicCache | None = None) -> Any:
    """predicted: how many of the last tokens are; 0: all. cache: of tokens that are not run again."""
    inputs: dict[str, Any] = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if cache is not None:
        inputs["input_ids"] = inputs["input_ids"][:, cache.get_seq_length() :]
        inputs |= {"past_key_values": cache, "use_cache": True}
    return model(**inputs, logits_to_keep=predicted)
