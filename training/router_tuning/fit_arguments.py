"""The flags of `router-tuning fit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_mod.granularity import POLICIES

#: Tokens of a decision window, and rank of what stands in for a skipped sublayer, where none is named. Of windows 16
#: said nothing about requests and 4096 spares no prompt anything (docs/quality.md).
DEFAULT_WINDOW, DEFAULT_RANK = 64, 64


def distilled_samples() -> Any:
    """Of whatever fits patches."""
    text = "on which the fitted patches are then brought nearer to the dense model's predictions"
    return field(default=256, metadata={"help": f"samples, of --max-samples, {text}; 0: none"})


def in_bf16() -> Any:
    default = "on a GPU, and on a CPU that multiplies in it if the base's weights are stored so; fp32 elsewhere"
    return field(default=None, metadata={"help": f"measure and fit in bf16; true or false; default: {default}"})


def distilled_passes() -> Any:
    return field(default=2, metadata={"help": "times that each of these is gone over"})


@dataclass
class FitArguments:
    """Layers, routers and thresholds without a gradient: what skipping costs each request is measured, layer by layer;
    routers are fitted to predict it, and skip where it is least. It takes as many forward passes over
    --measured-samples as half of the layers. Patches are fitted, then distilled."""

    model: str = field(metadata={"help": "base model: a directory, a hub name, or smollm2 (pip brings it)"})
    data: list[str] = field(metadata={"help": "prompts with answers like those that will be served, as for train"})
    output: str = field(metadata={"help": "the checkpoint to write; must not exist"})
    granularity: str = field(
        default="attn_sequence",
        metadata={
            "help": "what is skipped, per what",
            "choices": [g for g, policy in POLICIES.items() if policy.by_request],
        },
    )
    layers: list[str] | None = field(
        default=None, metadata={"help": "routed layers, as for train; default, or `auto`: the half that costs least"}
    )
    window: str = field(
        default=str(DEFAULT_WINDOW), metadata={"help": "tokens at the start of a prompt that decide, and always run"}
    )
    target_capacity: float | None = field(
        default=None,
        metadata={"help": "kept ratio of the routed layers, by token, between 0 and 1 (default: 0.5)"},
    )
    skip: float | None = field(
        default=None,
        metadata={"help": "how many layers an answer token skips on average, of all, where it costs least; in place of "
                  "--layers and --target-capacity"},
    )  # fmt: skip
    patch_rank: int = field(
        default=DEFAULT_RANK, metadata={"help": "rank of what stands in for a skipped sublayer; 0: a bias"}
    )
    static: bool = field(
        default=False,
        metadata={"help": "every request skips the same layers, the cheapest: what routers are to be compared with"},
    )
    compare_static: bool = field(
        default=True,
        metadata={"help": "make the patches of that drop, too, and write whichever is nearer to the dense model on "
                  "held-out answers once patches are distilled; true or false; it takes as long as routers' patches"},
    )  # fmt: skip
    measured_samples: int = field(default=128, metadata={"help": "samples whose costs are measured, of --max-samples"})
    costs: str | None = field(
        default=None,
        metadata={"help": "file that keeps what was measured: an interrupted run goes on from it, and one with another "
                  "--skip, --target-capacity or --static measures nothing again; default: beside --output, removed "
                  "at the end"},
    )  # fmt: skip
    bf16: bool | None = in_bf16()
    max_samples: int = field(default=512, metadata={"help": "samples that patches are fitted on"})
    distilled_samples: int = distilled_samples()
    distilled_passes: int = distilled_passes()
    max_length: int = field(default=512, metadata={"help": "tokens of a sample; longer ones are truncated"})
    eval_fraction: float = field(
        default=0.02, metadata={"help": "leave out the last part of every file, for evaluation; 0: all rows"}
    )
    seed: int = field(default=0, metadata={"help": "which of the rows are taken, and in which order"})

    def __post_init__(self) -> None:
        self.layers = None if self.layers == ["auto"] else self.layers
