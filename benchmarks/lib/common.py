"""What the benchmarks share: models with dummy weights, isolated runs, a record of the machine, result files."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from vllm_mod.architectures import BaseShape, architecture_of
from vllm_mod.config import ConfigError, ModConfig

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("vllm", "vllm-mod", "torch", "transformers")
#: an engine that runs in the process that made it, beside others
IN_PROCESS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
T = TypeVar("T")

SMALL_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_command(main: Callable[[], None], name: str, interrupted: str) -> None:
    """A benchmark as a command: what is wrong, and Ctrl-C, end it with one line."""
    try:
        main()
    except ConfigError as error:
        sys.exit(f"benchmarks.{name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"benchmarks.{name}: {interrupted}")


def command_line(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`; doc: the module's, shown as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def result_file(text: str) -> Path:
    """An argument's type: the file that a result goes into. Refused before the work where it cannot be written."""
    path = Path(text)
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not there.is_dir() or not os.access(path if path.exists() else there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: no file can be written there")
    return path


def fraction(text: str) -> float:
    """An argument's type: of a whole. 1 is all of it; so 7 is no percentage."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0, up to 1, is needed")
    return value


def output_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """`--output`; default: below `RESULTS`."""
    parser.add_argument("--output", type=result_file, default=RESULTS / default, help="default: %(default)s")


def llama_config(directory: Path, **overrides: Any) -> Path:
    """A directory with the `config.json` of a small Llama, for `load_format="dummy"`; no weights, no tokenizer."""
    return _write_config(directory, SMALL_LLAMA | overrides)


def copied_config(directory: Path, model: Path) -> Path:
    """The shape of a real model; its weights stay where they are."""
    return _write_config(directory, json.loads((model / "config.json").read_text()))


def routed_config(
    directory: Path,
    base: Path,
    granularity: str,
    layers: Sequence[int],
    threshold: Sequence[float] | float | None = None,
    window: int | None = None,
    patch_rank: int | None = None,
) -> Path:
    """The routed counterpart of `base`; thresholds 0 and 1 make every decision known beforehand."""
    config = json.loads((base / "config.json").read_text())
    settings: dict[str, Any] = {"version": 1, "granularity": granularity, "layers": list(layers)}
    if window is not None:
        settings |= {"version": 2, "window": window}
    if patch_rank is not None:
        settings |= {"version": 2, "patch": {"rank": patch_rank}}
    if threshold is not None:
        settings["threshold"] = threshold
    mod = ModConfig.parse(settings, "benchmark")
    shape = BaseShape.of(config, str(base / "config.json"))
    mod.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    architectures = [architecture_of(shape.architecture).routed]
    return _write_config(directory, config | {"architectures": architectures, "mod_config": mod.to_dict()})


def _write_config(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def isolated(function: Callable[..., T], *args: Any, **environment: str) -> T:
    """`function(*args)` in a fresh process, its stdout sent to stderr; one engine per process, nothing left behind."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_stdout_to_stderr) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _stdout_to_stderr() -> None:
    os.dup2(2, 1)


def cpu_flags() -> dict[str, str]:
    """vLLM's, on a CPU: its default, bfloat16, takes several times as long there without AVX512 or AMX."""
    from vllm.platforms import current_platform

    return {"dtype": "float32"} if current_platform.is_cpu() else {}


def metric_totals(llm: Any) -> dict[str, float]:
    """Counters and gauges of an engine, by name; sums over their labels."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            totals[metric.name] = totals.get(metric.name, 0) + metric.value
    return totals


def routed_pairs(llm: Any) -> dict[str, dict[int, float]]:
    """{"kept", "routed": {layer: pairs since the start}} of an `LLM` with `disable_log_stats=False`."""
    counts: dict[str, dict[int, float]] = {"kept": {}, "routed": {}}
    for metric in llm.get_metrics():
        for name, found in counts.items():
            if metric.name == f"vllm:mod_{name}":
                found[int(metric.labels["layer"])] = metric.value
    return counts


def machine() -> dict[str, Any]:
    """CPU, cores, memory, GPU, package versions: what a number depends on. No names of hosts or people."""
    record: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if Path("/proc/driver/nvidia/version").exists():
        import torch

        record["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return record | {"versions": {name: _version(name) for name in PACKAGES}}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(module: str) -> str:
    """What to type to repeat this run."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    progress(f"wrote {path}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
