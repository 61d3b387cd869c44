"""What routing costs on held-out data: perplexity of the answers, dense, routed and statically dropped, and the kept
ratio that the engine really had on the same prompts.

Perplexity is the float32 reference's (the engine equals it, see tests/parity); decisions are taken from the prompt
alone, as they are when a request is served. The kept ratio is read from the engine's own counters.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_mod.checkpoint import read_json, read_mod_config
from vllm_mod.config import ModConfig

from .common import RESULTS, command, isolated, machine, progress, routed_pairs, write_json

if TYPE_CHECKING:
    from torch import Tensor


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heldout", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what `router-tuning train` wrote")
    parser.add_argument("--model", type=Path, required=True, help="its base model")
    parser.add_argument("--data", nargs="+", required=True, help="files whose last part was held out in training")
    parser.add_argument("--fraction", type=float, default=0.02, help="held-out part of a file (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--static-layers", type=int, nargs="*", default=[], help="layers to drop, to compare with")
    parser.add_argument("--output", type=Path, default=RESULTS / "heldout.json", help="default: %(default)s")
    return parser.parse_args()


def held_out(args: argparse.Namespace) -> list[dict[str, Any]]:
    from router_tuning.data import read_sources, split_tail, tokenize
    from router_tuning.tokenizer import load_tokenizer

    rows = split_tail(read_sources(args.data), args.fraction)[1]
    samples, counts = tokenize(rows, load_tokenizer(args.model), args.max_length, args.samples)
    progress(f"held-out data: {counts}")
    return list(samples)


def answer_losses(model: Any, samples: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Per sample the loss of its answer (nats, summed) and the answer's tokens, float64 `[N]` each.

    By the reference, so a sequence decision is taken from the prompt alone.
    """
    import torch

    from router_tuning.data import IGNORED
    from router_tuning.model import reference_logits

    losses, counts = [], []
    for sample in samples:
        logits = reference_logits(model, sample["input_ids"], sample["prompt_len"])
        labels = torch.tensor(sample["labels"])[1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORED, reduction="sum"))
        counts.append((labels != IGNORED).sum())
    return torch.stack(losses).double(), torch.stack(counts).double()


def perplexity(losses: Tensor, counts: Tensor) -> tuple[float, float]:
    """Of all answer tokens, and its standard error (over samples, delta method)."""
    value = math.exp(losses.sum() / counts.sum())
    return value, value * _spread(losses, counts)


def perplexity_ratio(losses: Tensor, others: Tensor, counts: Tensor) -> tuple[float, float]:
    """Perplexity relative to that of another model on the same samples; the error is that of the paired difference,
    which is far smaller than what either perplexity has by itself."""
    value = math.exp((losses - others).sum() / counts.sum())
    return value, value * _spread(losses - others, counts)


def _spread(losses: Tensor, counts: Tensor) -> float:
    mean = losses.sum() / counts.sum()
    return float((losses - mean * counts).std() * math.sqrt(len(losses)) / counts.sum())


def load_system(model: Path, config: ModConfig | None) -> Any:
    """The reference of a checkpoint (None: as it is stored), of other thresholds, or of a static drop of a base."""
    import torch

    from router_tuning.model import attach_routers, load_base, load_reference

    if config is None or "mod_config" in read_json(model / "config.json"):
        return load_reference(model, config=config)
    loaded = load_base(model, torch.float32).eval()
    attach_routers(loaded, config)
    return loaded


def dense_config(model: Path) -> ModConfig:
    """Routers that are zero keep everything: the base model, as the reference runs it."""
    last = read_json(model / "config.json")["num_hidden_layers"] - 1
    return ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [last]}, "dense")


def engine_kept(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Kept ratio in vLLM, in total and per layer, of requests with these prompts."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint), dtype="float32", enforce_eager=True, max_model_len=1024, block_size=32,
        kv_cache_memory_bytes=512 << 20, disable_log_stats=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    kept, routed = routed_pairs(llm).values()
    layers = {str(i): round(kept.get(i, 0) / n, 3) for i, n in sorted(routed.items())}
    return {"total": round(sum(kept.values()) / sum(routed.values()), 4), "layers": layers}


def main() -> None:
    args = arguments()
    config = read_mod_config(args.checkpoint)
    samples = held_out(args)
    systems: dict[str, tuple[Path, ModConfig | None]] = {
        "dense": (args.model, dense_config(args.model)),
        "routed": (args.checkpoint, None),
    }
    if args.static_layers:
        settings = {"version": 1, "granularity": f"{config.target}_static", "layers": args.static_layers}
        systems["static"] = args.model, ModConfig.parse(settings, "--static-layers")
    quality, losses = {}, {}
    for name, system in systems.items():
        losses[name], counts = answer_losses(load_system(*system), tqdm(samples, desc=f"perplexity: {name}"))
        value, error = perplexity(losses[name], counts)
        ratio, paired = perplexity_ratio(losses[name], losses["dense"], counts)
        quality[name] = {"perplexity": round(value, 3), "standard_error": round(error, 3)} | {
            "ratio_to_dense": round(ratio, 4), "ratio_standard_error": round(paired, 4)
        }  # fmt: skip
    progress("kept ratio in vLLM")
    prompts = [sample["input_ids"][: sample["prompt_len"]] for sample in samples]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    kept = isolated(engine_kept, args.checkpoint, prompts, **environment)
    result = {
        "command": command("heldout"),
        "machine": machine(),
        "mod_config": config.to_dict(),
        "samples": len(samples),
        "static_layers": args.static_layers,
        "quality": quality,
        "kept_ratio": kept,
    }
    write_json(args.output, result)
    print(json.dumps({key: result[key] for key in ("quality", "kept_ratio")}))


if __name__ == "__main__":
    main()
