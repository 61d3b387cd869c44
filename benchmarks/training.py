"""How fast routers train, with the trunk shortcut and without it.

  trunk   `router-tuning train` as it is: autograd records from the first routed layer on
  full    the same routers, loss and trainer, but autograd records from the embeddings on

Weights and tokens are random, the step is RouterTrainer's own. Both ways train in turn in one process, `--repeats`
times after a warm-up; figures are medians, spread is (max - min) / median. The last line is

  {"shape", "samples_per_s": {...}, "spread": {...}, "seconds_for_5000_samples": {...}, "peak_memory_gib": {...},
   "tflop_per_sample": {...}, "speedup", "speedup_in_cpu_time", "not_significant"}

where FLOPs are those of matrix products and attention, forward and backward, counted in the warm-up, and peak memory is
the allocator's on CUDA and the process's on a CPU, weights included. Seconds are the clock's; read CPU time where other
work runs on the same CPU. An 8B model on one GPU of 80 GB, in bf16 (as every CUDA run):

  python -m benchmarks.training --shape llama3-8b --batch 4 --length 1024 --steps 20
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .lib.common import (
    command,
    command_line,
    llama_config,
    machine,
    markdown_table,
    output_argument,
    progress,
    run_command,
    write_json,
)
from .lib.shapes import SHAPES

WAYS = ("trunk", "full")
SAMPLES = 5000


def arguments() -> argparse.Namespace:
    parser = command_line("training", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-attention", help="default: %(default)s")
    parser.add_argument("--granularity", default="attn_sequence", help="default: %(default)s")
    parser.add_argument("--routed", type=int, default=None, help="the deepest N layers (default: half of them)")
    parser.add_argument("--batch", type=int, default=4, help="samples per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward")
    output_argument(parser, "training/cpu.json")
    args = parser.parse_args()
    total = SHAPES[args.shape]["num_hidden_layers"]
    args.routed = total // 2 if args.routed is None else args.routed
    if not 0 < args.routed <= total:
        parser.error(f"--routed {args.routed}: 1 to {total} of this shape's {total} layers")
    for name in ("batch", "length", "steps", "repeats"):
        if getattr(args, name) < (2 if name == "length" else 1):
            parser.error(f"--{name} {getattr(args, name)}: too few")
    return args


def random_model(args: argparse.Namespace, directory: Path) -> Any:
    """The shape with random weights, on the device, with routers (zero: all keep; what is computed is the same)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from router_tuning.model import attach_routers, freeze_base
    from vllm_mod.config import ModConfig

    config = AutoConfig.from_pretrained(llama_config(directory, **SHAPES[args.shape]))
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    total = config.num_hidden_layers
    settings = {"version": 1, "granularity": args.granularity, "layers": list(range(total - args.routed, total))}
    mod = ModConfig.parse(settings, "benchmark")
    mod.check_fits(total)
    attach_routers(model, mod)
    freeze_base(model)
    return model


@contextlib.contextmanager
def recording_from_the_embeddings(model: Any) -> Iterator[None]:
    """What the shortcut leaves out: the input of the first layer asks for a gradient."""

    def ask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (args[0].requires_grad_(True), *args[1:]), kwargs

    hook = model.model.layers[0].register_forward_pre_hook(ask, with_kwargs=True)  # after the one of freeze_base
    try:
        yield
    finally:
        hook.remove()


def train(model: Any, args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """`--steps` steps of the product's trainer; seconds of the steps, and peak memory."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from router_tuning.arguments import RouterTrainingArguments
    from router_tuning.data import IGNORED, Collator
    from router_tuning.loss import CapacityLoss
    from router_tuning.trainer import RouterTrainer

    ids = torch.randint(model.config.vocab_size, (args.batch * args.steps, args.length)).tolist()
    prompt = args.length // 2
    rows = [{"input_ids": i, "labels": [IGNORED] * prompt + i[prompt:], "prompt_len": prompt} for i in ids]
    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not times:
                self.on_step_end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append((time.perf_counter(), time.process_time()))

    settings = RouterTrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=args.batch, learning_rate=1e-4, save_strategy="no",
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = RouterTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), data_collator=Collator(0),
        capacity=CapacityLoss("controller", 0.5), callbacks=[Clock()],
    )  # fmt: skip
    peak = peak_memory()
    trainer.train()
    seconds, cpu_seconds = (last - first for first, last in zip(times[0], times[-1], strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "samples": float(len(rows)), "peak_gib": peak() / 2**30}


def peak_memory() -> Callable[[], float]:
    """Starts a new measurement; what it returns gives the peak since then, in bytes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def peak() -> float:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])

    return peak


def measure(args: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """The runs of each way, and its FLOPs per sample."""
    from torch.utils.flop_counter import FlopCounterMode

    flops: dict[str, float] = {}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        model = random_model(args, Path(directory) / "base")
        for repeat in range(args.repeats + 1):
            for way in WAYS[:: 1 if repeat % 2 else -1]:  # nobody always goes first
                scope = recording_from_the_embeddings(model) if way == "full" else contextlib.nullcontext()
                counter = None if repeat else FlopCounterMode(display=False)
                with scope, counter or contextlib.nullcontext():
                    result = train(model, args, Path(directory) / "run")
                if counter is not None:
                    flops[way] = counter.get_total_flops() / result["samples"]
                title = f"repeat {repeat}" if repeat else "warm-up"
                progress(f"{title} {way}: {result['samples'] / result['seconds']:.2f} samples/s")
                if repeat:
                    runs[way].append(result)
    return runs, flops


def compared(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and whether the two ways differ by more than repeats of one way do."""
    rates = {way: [r["samples"] / r["seconds"] for r in found] for way, found in runs.items()}
    median = {way: statistics.median(found) for way, found in rates.items()}
    spread = {way: (max(found) - min(found)) / median[way] for way, found in rates.items()}
    speedup = median["trunk"] / median["full"]
    cpu = {way: statistics.median(r["cpu_seconds"] / r["samples"] for r in found) for way, found in runs.items()}
    return {
        "samples_per_s": {way: round(value, 3) for way, value in median.items()},
        "spread": {way: round(value, 3) for way, value in spread.items()},
        "seconds_for_5000_samples": {way: round(SAMPLES / value, 1) for way, value in median.items()},
        "peak_memory_gib": {way: round(max(r["peak_gib"] for r in found), 3) for way, found in runs.items()},
        "speedup": round(speedup, 3),
        "speedup_in_cpu_time": round(cpu["full"] / cpu["trunk"], 3),
        "not_significant": ["speedup"] if abs(speedup - 1) < max(spread.values()) else [],
    }


def main() -> None:
    args = arguments()
    runs, flops = measure(args)
    keys = ("shape", "granularity", "routed", "batch", "length", "gradient_checkpointing")
    result = {key: getattr(args, key) for key in keys} | compared(runs)
    result["tflop_per_sample"] = {way: round(value / 1e12, 6) for way, value in flops.items()}
    record = {"command": command("training"), "machine": machine(), "sizes": SHAPES[args.shape], "result": result}
    write_json(args.output, record | {"runs": runs})
    columns = ("samples_per_s", "spread", "seconds_for_5000_samples", "peak_memory_gib", "tflop_per_sample")
    progress(markdown_table(["", *columns], [[way, *(result[c][way] for c in columns)] for way in WAYS]))
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "training", "interrupted; nothing is written")
