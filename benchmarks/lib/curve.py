"""Perplexity of held-out answers against the kept ratio: a checkpoint at several thresholds, and static drops."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_mod.calibration import read_calibration
from vllm_mod.config import ModConfig

from .held_out import held_out
from .perplexity import (
    answer_losses,
    dense_config,
    kept_ratios,
    load_system,
    perplexity,
    perplexity_ratio,
)

CALIBRATION_SAMPLES = 64


class Perplexities:
    """By the float32 reference, decisions from the prompt alone; every system on the same samples."""

    def __init__(self, args: argparse.Namespace, config: ModConfig) -> None:
        self.base, self.checkpoint, self.config = args.model, args.checkpoint, config
        self.samples = held_out(args, [args.checkpoint])
        self._args = args

    def order(self) -> list[int]:
        """Layers as LLM-Drop's criterion drops them, the most dispensable first; by training samples."""
        import torch

        from router_tuning.data import read_sources, split_tail, tokenize
        from router_tuning.drop import sublayer_similarity
        from router_tuning.model import load_base
        from router_tuning.tokenizer import load_tokenizer

        rows = split_tail(read_sources(self._args.data), self._args.fraction)[0]
        tokenizer = load_tokenizer(self.base)
        calibration, _ = tokenize(rows, tokenizer, self._args.max_length, CALIBRATION_SAMPLES)
        model = load_base(self.base, torch.float32).eval()
        similarity = sublayer_similarity(model, calibration["input_ids"], self.config.policy.target)
        return sorted(range(len(similarity)), key=lambda i: -similarity[i])

    def measure(
        self, done: Callable[[str, Callable[[], Any]], Any], dropped: Sequence[int], thresholds: Sequence[Any] | None
    ) -> dict[str, Any]:
        """`perplexity` of base, checkpoint and static drop, and the `curve`'s further points. done: see `Finished`."""

        def losses(name: str, model: Path, config: ModConfig | None) -> dict[str, Any]:
            return done(f"perplexity: {name}", lambda: self._losses(name, model, config))

        base = losses("base", self.base, dense_config(self.base))
        systems = {"base": base, "checkpoint": losses("checkpoint", self.checkpoint, None)}
        if dropped:
            systems["static"] = losses(f"static {list(dropped)}", self.base, self._static(dropped))
        curve = [{"system": "routed", "threshold": None} | _relative(systems["checkpoint"], base)]
        if thresholds is None:
            configs = operating_points(self.checkpoint, self.config)
        else:
            configs = [self.config.with_threshold(threshold, "--thresholds") for threshold in thresholds]
        for config in configs:
            criterion, limits = config.criterion, config.to_dict()[config.criterion]
            found = losses(f"{criterion} {limits}", self.checkpoint, config)
            curve.append({"system": "routed", criterion: limits} | _relative(found, base))
        if not self.config.policy.by_experts:
            order = self.order()
            for number in range(1, len(self.config.layers) + 1):
                layers = sorted(order[:number])
                found = losses(f"static {layers}", self.base, self._static(layers))
                kept = {"kept": 1 - number / len(self.config.layers)}  # of as many sublayers as are routed
                curve.append({"system": "static", "layers": layers} | _relative(found | kept, base))
        return {"perplexity": {k: _relative(v, base) for k, v in systems.items()}, "curve": curve}

    def _static(self, layers: Sequence[int]) -> ModConfig:
        settings = {"version": 1, "granularity": f"{self.config.policy.target}_static", "layers": list(layers)}
        return ModConfig.parse(settings, "static drop")

    def _losses(self, name: str, path: Path, config: ModConfig | None) -> dict[str, Any]:
        from router_tuning.model import reference_decisions

        model = load_system(path, config)
        decisions: list[dict[int, Any]] = []

        def watched() -> Iterator[dict[str, Any]]:
            for sample in tqdm(self.samples, desc=f"perplexity: {name}"):
                yield sample
                decisions.append(reference_decisions(model))

        losses, counts = answer_losses(model, watched())
        ratios = kept_ratios(decisions, counts, self.config.policy.by_request).values()
        kept = sum(ratios) / len(ratios) if ratios else None
        return {"losses": losses.tolist(), "counts": counts.tolist(), "kept": kept}


def operating_points(checkpoint: Path, config: ModConfig) -> list[ModConfig]:
    """What `router-tuning calibrate` stored, as configs."""
    table = read_calibration(checkpoint, config)
    return [
        config.with_threshold(p.threshold) if p.threshold is not None else config.with_cutoff(p.cutoff)
        for p in (table.operating_points if table else [])
    ]


def _relative(system: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    import torch

    losses, others, counts = (
        torch.tensor(values, dtype=torch.float64) for values in (system["losses"], base["losses"], base["counts"])
    )
    value, error = perplexity(losses, counts)
    ratio, paired = perplexity_ratio(losses, others, counts)
    return {
        "kept": None if system["kept"] is None else round(system["kept"], 4),
        "perplexity": round(value, 3),
        "standard_error": round(error, 3),
        "ratio_to_base": round(ratio, 4),
        "ratio_standard_error": round(paired, 4),
    }
