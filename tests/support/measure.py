"""`python -m tests.support.measure DATA OUT BASE GRANULARITY …`: what RouterTrainer measures on all rows of DATA."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def measure(base: Path, data: Path, granularity: str) -> dict[str, Any]:
    """With routers of a fixed seed; in as many processes as the environment says."""
    import torch
    from transformers import AutoTokenizer

    from router_tuning.arguments import RouterTrainingArguments
    from router_tuning.data import Collator, read_sources, split_tail, tokenize
    from router_tuning.loss import CapacityLoss
    from router_tuning.model import attach_routers, load_base
    from router_tuning.trainer import RouterTrainer
    from vllm_mod.config import ModConfig

    rows, _ = split_tail(read_sources([str(data)]), 0.0)
    dataset, _ = tokenize(rows, AutoTokenizer.from_pretrained(base), 64)
    model = load_base(base, torch.float32)
    hidden, experts = model.config.hidden_size, getattr(model.config, "num_experts", 1)
    shape = (experts if granularity == "expert_token" else 1, hidden)
    draw = torch.Generator().manual_seed(5)
    config = ModConfig.parse({"version": 1, "granularity": granularity, "layers": [0, 1]}, "test")
    attach_routers(model, config, {i: torch.randn(shape, generator=draw) for i in (0, 1)})
    with tempfile.TemporaryDirectory() as directory:
        arguments = RouterTrainingArguments(output_dir=directory, per_device_eval_batch_size=4, use_cpu=True)
        trainer = RouterTrainer(
            model=model, args=arguments, eval_dataset=dataset, data_collator=Collator(2),
            capacity=CapacityLoss("controller", 0.5),
        )  # fmt: skip
        return trainer.measure().to_dict() | {"processes": arguments.world_size}


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:3])
    found = [measure(Path(base), data, kind) for base, kind in zip(sys.argv[3::2], sys.argv[4::2], strict=True)]
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
