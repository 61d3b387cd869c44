"""What `ablations` measures of a checkpoint: held-out perplexity beside that of static drops, and what decides."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from router_tuning.data import read_sources, split_tail, tokenize
from router_tuning.model import load_reference, reference_decisions, routing_of
from router_tuning.tokenizer import load_tokenizer
from vllm_mod.checkpoint import read_json, read_mod_config
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.trainer_log import read_log

from .perplexity import answer_losses, kept_ratios, perplexity, perplexity_ratio
from .static_drop import Switches, losses_at, orders


class Bench:
    """The same held-out samples for every system, so that differences are paired. Losses of static drops, which many
    runs share, are kept in memory and in the work directory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.base, self.work = args.model, args.work
        tokenizer = load_tokenizer(args.model)
        tables = read_sources(args.data)
        total = sum(len(rows) for rows in tables.values())
        self.samples: list[dict[str, Any]] = []
        self.calibration: list[dict[str, Any]] = []
        for name, rows in tables.items():
            rest, tail = split_tail({name: rows}, args.fraction)
            for part, found, wanted in (
                (tail, self.samples, args.held_out),
                (rest, self.calibration, args.calibration),
            ):
                share = max(1, round(wanted * len(rows) / total))
                kept, _ = tokenize(part, tokenizer, args.max_length, share)
                found += [sample | {"source": Path(name).name.split(".")[0]} for sample in kept]
        if len(self.samples) < 2 or not self.calibration:
            raise ConfigError(f"--data: {len(self.samples)} usable held-out samples; give more data, or --fraction")
        self.switches: dict[str, Switches] = {}
        self.orders: dict[tuple[str, tuple[int, ...], int], dict[str, list[int]]] = {}
        model = self._switches("attn")
        self.layers = model.layers
        model.drop([])
        self.dense, self.counts = answer_losses(model.model, tqdm(self.samples, desc="dense"))
        # Which samples on which model: their dense losses tell.
        digest = hashlib.sha256(self.dense.numpy().tobytes()).hexdigest()[:16]
        self._static_file = self.work / f"static-{digest}.json"
        self._static: dict[str, list[float]] = {}
        if self._static_file.is_file():
            self._static = read_json(self._static_file)

    def summary(self) -> dict[str, Any]:
        value, error = perplexity(self.dense, self.counts)
        sources = {s["source"]: 0 for s in self.samples}
        for sample in self.samples:
            sources[sample["source"]] += 1
        return {
            "samples": sources,
            "answer_tokens": int(self.counts.sum()),
            "dense_perplexity": round(value, 3),
            "standard_error": round(error, 3),
        }

    def evaluate(self, checkpoint: Path, num_layers: int) -> dict[str, Any]:
        """One trained checkpoint; its record in the result file."""
        config = read_mod_config(checkpoint)
        model = load_reference(checkpoint)
        losses, decisions = [], []
        for sample in tqdm(self.samples, desc=f"routed: {config.granularity}"):
            losses.append(answer_losses(model, [sample])[0])
            decisions.append({layer: keep.flatten() for layer, keep in reference_decisions(model).items()})
        routed = torch.cat(losses)
        kept = kept_ratios(decisions, self.counts, config.policy.by_request)
        mean = sum(kept.values()) / len(kept)
        value, error = perplexity(routed, self.counts)
        static = self._compare_static(config, (1 - mean) * num_layers, routed)
        return {
            "granularity": config.granularity,
            "layers": list(config.layers),
            "target": config.target_capacity,
            "kept": round(mean, 4),
            "kept_per_layer": {str(i): round(k, 3) for i, k in kept.items()},
            "perplexity": round(value, 3),
            "standard_error": round(error, 3),
            "ratio_to_dense": _pair(routed, self.dense, self.counts),
            "static": static,
            "ratio_to_best_static": min(
                (s["routed_to_static"] for s in static.values()), key=lambda pair: -pair[0], default=None
            ),
            "ratio_to_random": _pair(routed, self._random(model, config, decisions, kept), self.counts),
            "decisions": self._about(config, decisions),
            "trained": _training_log(checkpoint),
        }

    # ------------------------------------------------------------ static drops

    def _switches(self, target: str) -> Switches:
        if target not in self.switches:
            self.switches[target] = Switches(self.base, target)
        return self.switches[target]

    def _static_losses(self, target: str, layers: tuple[int, ...]) -> Tensor:
        if not layers:
            return self.dense
        key = f"{target} {' '.join(map(str, sorted(layers)))}"
        if key not in self._static:
            shown = tqdm(self.samples, desc=f"static: {key}")
            self._static[key] = self._switches(target).losses(layers, shown).tolist()
            self._static_file.parent.mkdir(parents=True, exist_ok=True)
            self._static_file.write_text(json.dumps(self._static))
        return torch.tensor(self._static[key], dtype=torch.float64)

    def _compare_static(self, config: ModConfig, dropped: float, routed: Tensor) -> dict[str, Any]:
        """Each way to choose `dropped` layers (a fraction: see `losses_at`) -> layers and ratios."""
        target, wanted = config.policy.target, (1 - (config.target_capacity or 0.5)) * len(config.layers)
        depth = min(math.ceil(wanted) + 1, len(config.layers))  # one more, should more be skipped than was asked for
        key = target, config.layers, depth
        if key not in self.orders:
            self.orders[key] = orders(self._switches(target), self.calibration, config.layers, depth)
        found = {}
        for name, order in self.orders[key].items():
            if dropped > len(order):
                continue
            static = losses_at(order, dropped, lambda layers: self._static_losses(target, layers))
            found[name] = {
                "order": order,
                "dropped": round(dropped, 3),
                "ratio_to_dense": _pair(static, self.dense, self.counts),
                "routed_to_static": _pair(routed, static, self.counts),
            }
        return found

    # ------------------------------------------------------------ what decides

    def _random(self, model: Any, config: ModConfig, decisions: list[dict[int, Tensor]], kept: dict[int, float]) -> Any:
        """Losses if the decisions were somebody else's: those of another sample (sequence level), or drawn at random
        with each layer's kept ratio (token level). What they are worth is what *choosing* is worth."""
        generator = torch.Generator().manual_seed(0)
        routers: dict[int, Any] = {}
        state = routing_of(model)
        before, state.routers, losses = state.routers, routers, []
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        cutoffs = {i: state.cutoff(i) for i in config.layers}
        for sample, other in zip(tqdm(self.samples, desc="random decisions"), order, strict=True):
            for i in config.layers:
                probability = float(decisions[other][i]) if config.policy.by_request else kept[i]

                def score(x: Tensor, probability: float = probability, cutoff: float = cutoffs[i]) -> Tensor:
                    shape = x.shape[:2]
                    draw = torch.rand(shape, generator=generator) if 0 < probability < 1 else torch.full(shape, 0.5)
                    return cutoff + torch.where(draw < probability, 1.0, -1.0)

                routers[i] = score
            losses.append(answer_losses(model, [sample])[0])
        state.routers = before
        return torch.cat(losses)

    def _about(self, config: ModConfig, decisions: list[dict[int, Tensor]]) -> dict[str, Any]:
        """How much decisions vary, and how much of that a sample's source (or a token's identity) accounts for."""
        sources = [s["source"] for s in self.samples]
        varying = [i for i in config.layers if 0.05 < torch.cat([d[i] for d in decisions]).double().mean() < 0.95]
        about: dict[str, Any] = {"layers_that_decide": varying}
        if config.policy.by_request:
            rows = torch.stack([torch.stack([d[i][0] for i in config.layers]) for d in decisions]).double()
            lengths = torch.tensor([float(s["prompt_len"]) for s in self.samples]).log()
            patterns = {tuple(row) for row in rows.int().tolist()}
            by_source = {}
            for name in dict.fromkeys(sources):
                by_source[name] = round(rows[[s == name for s in sources]].mean().item(), 3)
            about |= {
                "distinct_patterns": len(patterns),
                "kept_by_source": by_source,
                "explained_by_source": _explained(rows, sources),
                "correlation_with_log_prompt_length": round(_correlation(rows.mean(1), lengths), 3),
            }
        else:
            tokens = [t for s in self.samples for t in s["input_ids"]]
            rows = torch.stack([torch.cat([d[i] for d in decisions]) for i in config.layers], 1).double()
            owners = [s["source"] for s in self.samples for _ in s["input_ids"]]
            first = [min(t, 8) for s in self.samples for t in range(len(s["input_ids"]))]
            about |= {
                "explained_by_token": _explained(rows, tokens),
                "explained_by_source": _explained(rows, owners),
                "explained_by_position_up_to_8": _explained(rows, first),
            }
        return about

    def oracle(self, routed: Sequence[int], number: int) -> dict[str, Any]:
        """What choosing half of the `routed` attentions per request can give at best, by trying every choice.

        `request` knows each answer; `source` knows only where a prompt comes from; `fixed` is one choice for all.
        Each is chosen on the very samples it is reported on, so all of them flatter.
        """
        picked = random.Random(0).sample(range(len(self.samples)), min(number, len(self.samples)))
        samples = [self.samples[i] for i in picked]
        choices = list(itertools.combinations(routed, len(routed) // 2))
        switches = self._switches("attn")
        table = torch.stack([switches.losses(c, samples) for c in tqdm(choices, desc="oracle: choices")])
        dense, counts = self.dense[picked], self.counts[picked]
        fixed = int(table.sum(1).argmin())
        by_source = table[fixed].clone()
        for name in {s["source"] for s in samples}:
            mask = torch.tensor([s["source"] == name for s in samples])
            by_source[mask] = table[int(table[:, mask].sum(1).argmin()), mask]
        found = {"fixed": table[fixed], "source": by_source, "request": table.min(0).values}
        return {
            "routed": list(routed),
            "samples": len(samples),
            "choices": len(choices),
            "fixed_choice_drops": list(choices[fixed]),
            "ratio_to_dense": {name: _pair(losses, dense, counts) for name, losses in found.items()},
        }


def _pair(losses: Tensor, others: Tensor, counts: Tensor) -> list[float]:
    """[ratio of perplexities, its paired standard error]."""
    return [round(x, 4) for x in perplexity_ratio(losses, others, counts)]


def _explained(rows: Tensor, groups: Sequence[Any]) -> float | None:
    """Share of the decisions' variance `[N, layers]` that lies between groups, less what chance gives (adjusted R²)."""
    index: dict[Any, int] = {}
    label = torch.tensor([index.setdefault(g, len(index)) for g in groups])
    sizes = torch.bincount(label).double()[:, None]
    means = torch.zeros(len(index), rows.shape[1], dtype=torch.float64).index_add_(0, label, rows) / sizes
    total = (rows - rows.mean(0)).square().sum()
    if total == 0:
        return None
    within = (rows - means[label]).square().sum()
    return round(float(1 - (within / (len(rows) - len(index))) / (total / (len(rows) - 1))), 3)


def _correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].nan_to_num())


def _training_log(checkpoint: Path) -> dict[str, Any]:
    log = read_log(checkpoint)
    steps = log.steps if log else []
    return {"steps": len(steps), "kept_in_last_steps": round(_mean(step.kept for step in steps[-10:]), 3)}


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / max(len(found), 1)
