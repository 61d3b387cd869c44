"""What routing costs on held-out data, beside whatever it is to be compared with: perplexity of the answers, KL to the
dense model's predictions, how often the likeliest token is the same, sublayers that a request and that an answer token
skip on average, and the kept ratio that the engine really had on the same prompts.

All but the last are the float32 reference's (the engine equals it, see tests/parity); decisions are taken from the
prompt alone, as they are when a request is served. The kept ratio is read from the engine's own counters. Errors of
ratios are those of paired differences, over samples.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from router_tuning.allocator import keep_freed_memory
from router_tuning.hub import local_model
from router_tuning.patches import with_patch
from router_tuning.per_token import mean_per_token
from vllm_mod.checkpoint import read_mod_config
from vllm_mod.config import ModConfig

from .lib.common import (
    IN_PROCESS,
    command,
    command_line,
    isolated,
    machine,
    output_argument,
    progress,
    run_command,
    write_json,
)
from .lib.engine_kept import engine_kept
from .lib.held_out import check_checkpoint, held_out, held_out_arguments, names_of, prompts_of
from .lib.perplexity import Answers, compare, dense_config, load_system, perplexity, perplexity_ratio

if TYPE_CHECKING:
    from torch import Tensor


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("heldout", __doc__)
    parser.add_argument("checkpoint", type=Path, help="what `router-tuning train` or `fit` wrote")
    parser.add_argument("--model", required=True, help="its base model: a directory, a hub name, or smollm2")
    parser.add_argument("--data", nargs="+", required=True, help="files whose last part was held out in training")
    held_out_arguments(parser)
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], help="further checkpoints of the same base, by their directory"
    )
    parser.add_argument("--static-layers", type=int, nargs="*", default=[], help="layers to drop, to compare with")
    parser.add_argument(
        "--without-patches", action="store_true", help="measure every checkpoint with nothing in place of what it skips"
    )
    output_argument(parser, "heldout/result.json")
    return parser.parse_args(argv)


def summary(found: Answers, answers: Mapping[str, Answers], counts: Tensor) -> dict[str, float]:
    """The row of one system; answers: of all."""
    value, error = perplexity(found.losses, counts)
    nats, nats_error = mean_per_token(found.divergence, counts)
    row = {"perplexity": round(value, 3), "standard_error": round(error, 3)}
    for other in ("dense", "routed"):
        ratio, paired = perplexity_ratio(found.losses, answers[other].losses, counts)
        row |= {f"ratio_to_{other}": round(ratio, 4), f"ratio_to_{other}_standard_error": round(paired, 4)}
    above, above_error = mean_per_token(found.divergence - answers["routed"].divergence, counts)
    return row | {
        "kl_to_dense": round(nats, 4),
        "kl_standard_error": round(nats_error, 4),
        "kl_above_routed": round(above, 4),
        "kl_above_routed_standard_error": round(above_error, 4),
        "same_token": round(mean_per_token(found.same, counts)[0], 4),
        "sublayers_skipped": round(float(found.skipped.mean()), 3),
        "sublayers_skipped_by_token": round(mean_per_token(found.skipped * counts, counts)[0], 3),
    }


def _rounded(sums: Tensor) -> list[float]:
    return [round(value, 3) for value in sums.tolist()]


def kept_in_vllm(checkpoint: Path, config: ModConfig, prompts: list[list[int]]) -> dict[str, Any] | None:
    """See `engine_kept`; None where there is nothing to count, or nobody to count it."""
    if config.is_static:
        return None
    if importlib.util.find_spec("vllm") is None:
        progress("vLLM is not installed: its kept ratio is left out")
        return None
    progress("kept ratio in vLLM")
    try:
        return isolated(engine_kept, checkpoint, prompts, **IN_PROCESS)
    except KeyboardInterrupt:
        progress("interrupted: vLLM's kept ratio is left out")
        return None


def main(argv: Sequence[str] | None = None) -> None:
    import torch

    args = arguments(argv)
    keep_freed_memory()
    args.model = local_model(args.model)
    others = names_of(args.others, ("dense", "routed", *(("static",) if args.static_layers else ())))
    config = check_checkpoint(args.checkpoint, args.model)
    for other in others.values():
        check_checkpoint(other, args.model)
    samples = held_out(args, [args.checkpoint, *others.values()])
    systems: dict[str, tuple[Path, ModConfig | None]] = {
        "dense": (args.model, dense_config(args.model)),
        "routed": (args.checkpoint, None),
    }
    if args.static_layers:
        settings = {"version": 1, "granularity": f"{config.policy.target}_static", "layers": args.static_layers}
        systems["static"] = args.model, ModConfig.parse(settings, "--static-layers")
    systems |= {name: (other, None) for name, other in others.items()}
    if args.without_patches:
        for name, checkpoint in {"routed": args.checkpoint, **others}.items():
            systems[f"{name} without patches"] = checkpoint, with_patch(read_mod_config(checkpoint), None)
    models = {name: load_system(*system) for name, system in systems.items()}
    answers, counts = compare(models, tqdm(samples, desc=f"{len(models)} systems", unit="sample"))
    del models
    torch.cuda.empty_cache()  # vLLM looks for it
    quality = {name: summary(found, answers, counts) for name, found in answers.items()}
    result = {
        "command": command("heldout"),
        "machine": machine(),
        "mod_config": config.to_dict(),
        "samples": len(counts),
        "static_layers": args.static_layers,
        "quality": quality,
        "kept_ratio": None,
    }
    write_json(args.output, result)  # it took long, and an engine may fail
    per_sample = {name: {"loss": _rounded(f.losses), "kl": _rounded(f.divergence)} for name, f in answers.items()}
    beside = args.output.with_suffix(".samples.json")  # so that runs over other samples can be added up
    beside.write_text(json.dumps({"answer_tokens": counts.int().tolist(), **per_sample}) + "\n")
    if kept := kept_in_vllm(args.checkpoint, config, prompts_of(samples[: len(counts)])):
        result["kept_ratio"] = kept
        write_json(args.output, result)
    print(json.dumps({key: result[key] for key in ("quality", "kept_ratio")}))


if __name__ == "__main__":
    run_command(main, "heldout", "interrupted before two samples were measured; nothing is written")
