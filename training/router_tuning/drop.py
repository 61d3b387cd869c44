"""Which sublayers to drop for good: the criterion of LLM-Drop (arXiv 2406.15786, section 3).

    importance_l = 1 - mean over tokens of cos(x, y)      x, y: the residual stream before and after sublayer F

A sublayer that hardly turns its input is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_mod.architectures import BaseShape
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.tensors import Patch

from .arguments import ExportArguments
from .data import calibration_samples
from .loading import fitting_dtype, on_best_device, stored_dtype
from .model import architecture_of_model, attach_routers, decoder_layers, load_base, patch_weights
from .patch_record import PATCHES_FILE
from .patches import check_rank, collate, with_patch
from .patching import beside, make_patches, unfinished
from .preflight import check_vocabulary, check_writable
from .selection import cheapest
from .unfinished import Unfinished

#: Samples of a forward in which patches are fitted.
_BATCH = 16
#: Target -> where the residual stream is read before and after it.
_ENDS = {"attn": ("before", "between"), "mlp": ("between", "after"), "block": ("before", "after")}


def attention_similarity(model: Any, samples: Sequence[Sequence[int]]) -> list[float]:
    """Mean cosine similarity of each layer's attention input and output, residual included. samples: token ids."""
    return sublayer_similarity(model, samples, "attn")


@torch.no_grad()
def sublayer_similarity(model: Any, samples: Sequence[Sequence[int]], target: str) -> list[float]:
    """The same for `attn`, `mlp` or `block`, a whole layer.

    The residual stream itself is compared, as it enters a layer, between attention and MLP (where the MLP's norm reads
    it) and as it leaves: whatever a model does to a sublayer's output before it adds it is part of F.
    """
    norm = architecture_of_model(model).mlp_norm
    layers = decoder_layers(model)
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    stream: dict[str, Tensor] = {}
    hooks = []
    for index, layer in enumerate(layers):

        def enters(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            stream["before"] = (args[0] if args else kwargs["hidden_states"]).float()

        def between(_: nn.Module, args: Any) -> None:
            stream["between"] = args[0].float()

        def leaves(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            stream["after"] = (output[0] if isinstance(output, tuple) else output).float()
            x, y = (stream[name] for name in _ENDS[target])
            sums[index] += torch.cosine_similarity(x, y, dim=-1).double().sum().cpu()

        hooks += [
            layer.register_forward_pre_hook(enters, with_kwargs=True),
            getattr(layer, norm).register_forward_pre_hook(between),
            layer.register_forward_hook(leaves),
        ]
    try:
        for sample in tqdm(samples, desc=f"{target} similarity", unit="sample"):
            model(input_ids=torch.tensor([list(sample)], device=model.device), use_cache=False)
            tokens += len(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / tokens).tolist()


def most_similar(similarity: Sequence[float], number: int) -> list[int]:
    """The `number` layers that change their input least, ascending; the earlier one first where two are equal."""
    return cheapest({layer: -value for layer, value in enumerate(similarity)}, number)


def dropped(
    args: ExportArguments, base: Path, shape: BaseShape, command: str
) -> tuple[ModConfig, dict[int, Patch], dict[str, str], Unfinished | None]:
    """`export --drop-attention N`: the N layers are chosen on calibration data, and their patches fitted on it.

    Returns the config, the patches if there shall be some, records of them, and the file that has them until the
    checkpoint has. command: what was typed.
    """
    if args.routers is not None or args.layers is not None or args.granularity not in (None, "attn_static"):
        raise ConfigError("--drop-attention chooses the layers itself; drop --routers, --layers and --granularity")
    if not args.data:
        raise ConfigError("--drop-attention needs calibration data; pass --data")
    assert args.drop_attention is not None
    if not 0 < args.drop_attention < shape.num_layers:
        raise ConfigError(
            f"--drop-attention: 1 to {shape.num_layers - 1} of the {shape.num_layers} layers can be dropped"
        )
    settings = {"version": 1, "granularity": "attn_static", "base_model": args.model}
    any_layers = ModConfig.parse(settings | {"layers": list(range(args.drop_attention))}, "--drop-attention")
    if args.patch_rank is not None:
        check_rank(args.patch_rank, any_layers, shape.hidden_size, "--patch-rank")
    output, batches = Path(args.output), None
    place = check_writable(output, output.absolute().parent)
    samples, counts = calibration_samples(args, base)
    check_vocabulary(base, samples)
    if args.patch_rank is not None:  # what is wrong with the data is said before the model is loaded
        batches = collate(samples, any_layers, args.patch_rank, _BATCH, ", ".join(args.data))
    model = on_best_device(load_base(base, fitting_dtype(base, args.bf16)).eval())
    similarity = attention_similarity(model, [sample["input_ids"] for sample in samples])
    layers = most_similar(similarity, args.drop_attention)
    for i, value in enumerate(similarity):
        print(f"layer {i:3}: similarity {value:.4f}{'  dropped' if i in layers else ''}")
    config = ModConfig.parse(settings | {"layers": layers}, "--drop-attention")
    if batches is None or args.patch_rank is None:
        return config, {}, {}, None
    attach_routers(model, config)
    file = unfinished(beside(output), model, samples, args.patch_rank, args, _BATCH)
    with file.named_on_interrupt():
        record = make_patches(model, samples, batches, args.patch_rank, args, place, command, counts.to_dict(), file)
        file.write()
    record.report()
    patches = patch_weights(model, stored_dtype(base))
    return with_patch(config, args.patch_rank), patches, {PATCHES_FILE: record.to_text()}, file
