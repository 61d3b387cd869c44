"""What routing costs on held-out data: perplexity of the answers, dense, routed and statically dropped, and the kept
ratio that the engine really had on the same prompts.

Perplexity is the float32 reference's (the engine equals it, see tests/parity); decisions are taken from the prompt
alone, as they are when a request is served. The kept ratio is read from the engine's own counters.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mod.checkpoint import read_json, read_mod_config
from vllm_mod.config import ModConfig

from .common import RESULTS, command, isolated, machine, progress, write_json


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
    from transformers import AutoTokenizer

    from training.data import read_sources, split_tail, tokenize

    rows = split_tail(read_sources(args.data), args.fraction)[1]
    samples, counts = tokenize(rows, AutoTokenizer.from_pretrained(args.model), args.max_length, args.samples)
    progress(f"held-out data: {counts}")
    return list(samples)


def perplexity(model: Any, samples: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Of the supervised tokens, and its standard error (over samples, delta method)."""
    import torch

    from training.data import IGNORED
    from training.model import reference_logits

    losses, counts = [], []
    for sample in samples:
        logits = reference_logits(model, sample["input_ids"], sample["prompt_len"])
        labels = torch.tensor(sample["labels"])[1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORED, reduction="sum"))
        counts.append((labels != IGNORED).sum())
    loss, count = torch.stack(losses).double(), torch.stack(counts).double()
    mean = loss.sum() / count.sum()
    spread = (loss - mean * count).std() * math.sqrt(len(samples)) / count.sum()
    return float(mean.exp()), float(mean.exp() * spread)


def reference(model: Path, config: ModConfig | None, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Perplexity of the base (as a model whose routers all keep), the checkpoint, or a static drop."""
    import torch

    from training.model import attach_routers, load_base, load_reference

    if config is None:
        loaded = load_reference(model)
    else:
        loaded = load_base(model, torch.float32).eval()
        attach_routers(loaded, config)
    value, error = perplexity(loaded, samples)
    return {"perplexity": round(value, 3), "standard_error": round(error, 3)}


def engine_kept(checkpoint: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Kept ratio in vLLM, in total and per layer, of requests with these prompts."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint), dtype="float32", enforce_eager=True, max_model_len=1024, block_size=32,
        kv_cache_memory_bytes=512 << 20, disable_log_stats=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    counts: dict[str, dict[int, float]] = {"kept": {}, "routed": {}}
    for metric in llm.get_metrics():
        for name, found in counts.items():
            if metric.name == f"vllm:mod_{name}":
                found[int(metric.labels["layer"])] = metric.value
    kept, routed = counts["kept"], counts["routed"]
    layers = {str(i): round(kept.get(i, 0) / n, 3) for i, n in sorted(routed.items())}
    return {"total": round(sum(kept.values()) / sum(routed.values()), 4), "layers": layers}


def main() -> None:
    args = arguments()
    config = read_mod_config(args.checkpoint)
    total = read_json(args.model / "config.json")["num_hidden_layers"]
    samples = held_out(args)
    quality = {}
    for name in ("dense", "routed", "static"):
        layers = {"dense": [total - 1], "static": args.static_layers}.get(name)
        if layers == []:
            continue
        progress(f"perplexity: {name}")
        plain = None
        if layers is not None:
            kind = config.granularity if name == "dense" else f"{config.target}_static"
            plain = ModConfig.parse({"version": 1, "granularity": kind, "layers": layers}, "static")
        quality[name] = reference(args.checkpoint if plain is None else args.model, plain, samples)
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
        "ratio_to_dense": {n: round(q["perplexity"] / quality["dense"]["perplexity"], 4) for n, q in quality.items()},
        "kept_ratio": kept,
    }
    write_json(args.output, result)
    print(json.dumps({key: result[key] for key in ("quality", "ratio_to_dense", "kept_ratio")}))


if __name__ == "__main__":
    main()
