"""What routing costs on held-out data: perplexity of the answers, dense, routed and statically dropped, and the kept
ratio that the engine really had on the same prompts.

Perplexity is the float32 reference's (the engine equals it, see tests/parity); decisions are taken from the prompt
alone, as they are when a request is served. The kept ratio is read from the engine's own counters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from vllm_mod.checkpoint import read_mod_config
from vllm_mod.config import ModConfig

from .lib.common import RESULTS, command, isolated, machine, progress, write_json
from .lib.engine_kept import engine_kept
from .lib.perplexity import answer_losses, dense_config, held_out, load_system, perplexity, perplexity_ratio


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heldout", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what `router-tuning train` wrote")
    parser.add_argument("--model", type=Path, required=True, help="its base model")
    parser.add_argument("--data", nargs="+", required=True, help="files whose last part was held out in training")
    parser.add_argument("--fraction", type=float, default=0.02, help="held-out part of a file (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--static-layers", type=int, nargs="*", default=[], help="layers to drop, to compare with")
    parser.add_argument("--output", type=Path, default=RESULTS / "heldout/result.json", help="default: %(default)s")
    return parser.parse_args()


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
