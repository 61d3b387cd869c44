"""The model card: a checkpoint's README.md, made of the records beside it and nothing else.

`write` may be called again whenever one of them changed: after training, calibration, evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_mod.calibration import Calibration, read_calibration
from vllm_mod.checkpoint import is_router_only, read_mod_config
from vllm_mod.config import ModConfig
from vllm_mod.dial import ways_to_ask
from vllm_mod.evaluation import Evaluation, Task, read_evaluation
from vllm_mod.files import REFERENCE_COMMAND, read_json, replacing
from vllm_mod.trainer_log import Data, Table, TrainerLog, read_log

from . import patch_record
from .counts import summary
from .plot import PLOT_FILE
from .records import Arguments, read_arguments

CARD_FILE = "README.md"
#: Words of a licence's text -> the hub's name of it.
_LICENCES = {
    "Apache License": "apache-2.0",
    "MIT License": "mit",
    "LLAMA 2 COMMUNITY LICENSE": "llama2",
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "LLAMA 3.1 COMMUNITY LICENSE": "llama3.1",
    "LLAMA 3.2 COMMUNITY LICENSE": "llama3.2",
    "LLAMA 3.3 COMMUNITY LICENSE": "llama3.3",
}
_IN_TRANSFORMERS = f"""## In transformers

`AutoModelForCausalLM.from_pretrained` gives the *dense base model* of this checkpoint without a word, since
`model_type` is the base's; so do tools that load with it, such as peft and lm-eval's `hf` backend (use
`lm_eval --model vllm`). With its routers (needs `vllm-mod[train]`):

```console
$ {REFERENCE_COMMAND}
```"""
_LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes, from its default on


def write(directory: Path) -> None:
    """Write `README.md` of a checkpoint or router-only directory, in one step; never through a link to the base's.

    Raises ConfigError on a record that cannot be read, with the card as it was.
    """
    directory = Path(directory)
    path = directory / CARD_FILE
    text = render(directory)
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def render(directory: Path) -> str:
    """The card's text."""
    config = read_mod_config(directory)
    args, log, evaluation = read_arguments(directory), read_log(directory), read_evaluation(directory)
    calibration = read_calibration(directory, config)
    command = (directory / "train_command.txt").read_text() if (directory / "train_command.txt").is_file() else ""
    licence = _licence(directory)
    sections = [
        "---\n" + yaml.safe_dump(_front_matter(config, licence), sort_keys=False, allow_unicode=True) + "---",
        f"# {_base_name(config)}, {config.granularity}",
        _introduction(config),
        _serving(directory, config, args),
        "" if is_router_only(directory) else _IN_TRANSFORMERS,
        _kept(config, log, calibration),
        _operating_points(config, calibration),
        patch_record.section(directory, config),
        _evaluation(evaluation),
        _training(config, args, log, command),
        f"![kept ratio and lambda in training]({PLOT_FILE})" if (directory / PLOT_FILE).is_file() else "",
        _licence_section(licence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


# ---------------------------------------------------------------- what it is


def _base_name(config: ModConfig) -> str:
    """Never a directory of the machine it was made on."""
    return Path(config.base_model or "base model").name


def _hub_name(config: ModConfig) -> str | None:
    name = config.base_model or ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] != "." and not Path(name).exists() else None


def _front_matter(config: ModConfig, licence: dict[str, str]) -> dict[str, Any]:
    base = _hub_name(config)
    tags = ["vllm", "vllm-mod", "dynamic-depth", "mixture-of-depths", "router-tuning", config.granularity]
    return {"library_name": "vllm-mod", "pipeline_tag": "text-generation", "tags": tags} | (
        {"base_model": base} if base else {}
    ) | licence  # fmt: skip


def _introduction(config: ModConfig) -> str:
    base, layers = _hub_name(config), _ranges(config.layers)
    name = f"[{base}](https://huggingface.co/{base})" if base else _base_name(config)
    if config.is_static:
        text = f"{name} without the {config.policy.words} of layers {layers}: always skipped, there are no routers."
        return f"{text} {_patch(config)}".rstrip()
    return (
        f"{name} with routers (one linear gate per layer, [Router-Tuning](https://arxiv.org/abs/2410.13184)) in front "
        f"of the {config.policy.words} of layers {layers}. They decide {_unit(config)}, whether it runs. "
        f"{'' if config.window is None else 'These tokens always run, all later ones follow the decision. '}"
        f"What is skipped is not computed, and attention that is skipped keeps no KV cache. {_patch(config)}"
    ).rstrip()


def _unit(config: ModConfig) -> str:
    if config.policy.by_token:
        return "per token"
    if config.window is None:
        return "per request, from the mean over its prompt"
    return f"per request, from the mean over the first {config.window} tokens of its prompt"


def _patch(config: ModConfig) -> str:
    if config.patch is None:
        return ""
    rank = config.patch.rank
    what = f"a linear map of rank {rank} of its input and a bias" if rank else "a bias"
    return f"In place of what is skipped a patch is added: {what}."


def _ranges(layers: Sequence[int]) -> str:
    """`[1, 2, 3, 5]` -> `1-3, 5`"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _serving(directory: Path, config: ModConfig, args: Arguments | None) -> str:
    lines, more = [], ""
    if is_router_only(directory):
        base = _hub_name(config) or "BASE"
        lines.append(f"router-tuning export --model {base} --routers ROUTERS --output CKPT   # these are routers alone")
    if (directory / "adapter" / "adapter_config.json").is_file():
        rank = int(read_json(directory / "adapter" / "adapter_config.json")["r"])
        room = next((r for r in _LORA_RANKS if r >= rank), rank)
        flag = f" --max-lora-rank {room}" if room > _LORA_RANKS[0] else ""
        lines.append(f"vllm serve CKPT --enable-lora --lora-modules tuned=CKPT/adapter{flag}")
        more = "\n\nThe routers were trained together with the LoRA adapter: ask for the model `tuned`."
    else:
        lines.append("vllm serve CKPT")
        if args and args.lora_r:
            more = (
                "\n\nA LoRA adapter was trained with the routers and is merged into these weights: the routers belong "
            )
            more += "to them, not to the base model."
    needs = "Needs vLLM 0.32 with the `vllm-mod` plugin; without it vLLM refuses this architecture."
    return f"## Serve\n\n{needs}\n\n```console\n" + "\n".join(f"$ {line}" for line in lines) + "\n```" + more


# ---------------------------------------------------------------- what was measured


def _kept(config: ModConfig, log: TrainerLog | None, calibration: Calibration | None) -> str:
    if config.is_static:
        return ""
    trained = log.held_out.kept_per_layer if log else {}
    calibrated = calibration.kept_per_layer if calibration else {}
    head = ["layer", config.criterion]
    columns: list[dict[str, float]] = []
    for name, found in (("kept on held-out data, after training", trained), ("calibrated", calibrated)):
        if found:
            head, columns = [*head, name], [*columns, found]
    rows = [
        [str(layer), f"{limit:.4g}", *(_number(column.get(str(layer))) for column in columns)]
        for layer, limit in zip(config.layers, config.limits, strict=True)
    ]
    means: list[float | None] = [log.held_out.kept] if log and trained else []
    means += [calibration.kept] if calibration and calibrated else []
    if means:
        rows.append(["all", "", *map(_number, means)])
    asked = f", asked for {config.target_capacity:g}" if config.target_capacity is not None else ""
    return f"## Kept ratio\n\nShare of decisions that run the sublayer{asked}.\n\n{_table(head, rows)}"


def _operating_points(config: ModConfig, calibration: Calibration | None) -> str:
    if calibration is None or not calibration.operating_points:
        return ""
    rows = []
    for point in calibration.operating_points:
        ways = " or ".join(f"`{way}`" for way in ways_to_ask(point, config))
        rows.append([_number(point.target, 2), _number(point.kept, 4), ways])
    return (
        f"## Operating points\n\nOne checkpoint, several speeds (measured on {calibration.samples or '?'} "
        f"calibration samples):\n\n{_table(['kept ratio asked for', 'measured', 'how to ask vLLM for it'], rows)}\n\n"
        f"```console\n$ {calibration.command or 'router-tuning calibrate'}\n```"
    )


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    parts, tasks = ["## Evaluation"], evaluation.tasks
    systems = [s for s in ("base", "checkpoint", "static") if any(getattr(t, s) is not None for t in tasks.values())]
    if tasks:
        rows = [
            [name, f"{task.metric}, {task.shots}-shot", str(task.samples), *(_with_error(task, s) for s in systems)]
            for name, task in tasks.items()
        ]
        for found, system in ((evaluation.recovery, "checkpoint"), (evaluation.static_recovery, "static")):
            if system in systems and found is not None:
                cells = ["", *(_number(found) if s == system else "" for s in systems[1:])]
                rows.append([f"{system} / base, mean over tasks", "", "", *cells])
        parts.append(_table(["task", "metric", "samples", *systems], rows))
    if perplexity := {k: v for k, v in evaluation.perplexity.items() if v is not None}:
        parts.append(
            "Perplexity of held-out answers: " + ", ".join(f"{_number(v, 2)} {k}" for k, v in perplexity.items())
        )
    if evaluation.kept_ratio is not None:
        parts.append(f"Kept ratio during this evaluation: {_number(evaluation.kept_ratio)}")
    if "static" in systems:
        parts.append("*static*: as many sublayers dropped for good as the checkpoint skipped on average.")
    return "\n\n".join([*parts, f"```console\n$ {evaluation.command}\n```"])


def _with_error(task: Task, system: str) -> str:
    error = getattr(task, f"{system}_stderr")
    return _number(getattr(task, system)) + (f" ± {_number(error)}" if error is not None else "")


# ---------------------------------------------------------------- how it was made


def _training(config: ModConfig, args: Arguments | None, log: TrainerLog | None, command: str) -> str:
    parts = ["## How it was made"] if args or log or command else []
    if log:
        parts.append(
            f"Perplexity of held-out answers at the end of training: {_number(log.held_out.perplexity, 2)} routed, "
            f"{_number(log.held_out.dense_perplexity, 2)} base."
        )
        parts.append(_data(log.data))
    if args:
        facts: dict[str, Any] = {"seed": args.seed, "steps": len(log.steps) if log else None}
        facts["samples per device and step"] = args.per_device_train_batch_size
        facts["target capacity"] = config.target_capacity
        facts["learning rate"] = args.learning_rate
        if args.lora_r:
            facts |= {"LoRA rank": args.lora_r, "LoRA alpha": args.lora_alpha}
            facts["LoRA learning rate"] = args.lora_learning_rate
            facts["LoRA on"] = ", ".join(args.lora_target_modules or [])
            facts["in layers"] = _ranges(list(map(int, args.lora_layers or [])))
        parts.append(_table(["", ""], [[name, str(value)] for name, value in facts.items() if value is not None]))
    if command:
        lines = command.strip().splitlines()
        versions = ", ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
        typed = [line for line in lines if line and not line.startswith("#")]
        parts.append("```console\n" + "\n".join(f"$ {line}" for line in typed) + "\n```")
        parts.append(f"Versions: {versions}." if versions else "")
    return "\n\n".join(part for part in parts if part)


def _data(data: Data) -> str:
    tables = data.tables or [Table(name=name) for name in data.sources]
    taken = [f"x {t.portion or 1:g}" if t.samples is None else f"{t.samples} samples" for t in tables]
    unread = [", ".join(t.fields_not_read or ["-"]).replace("|", "\\|") for t in tables]
    head = ["data", "rows", "taken", "fields not read"]
    names, sizes = [_file_name(t.name) for t in tables], ["-" if t.rows is None else str(t.rows) for t in tables]
    rows = zip(names, sizes, taken, unread, strict=True)
    text = [
        f"{what}: {summary(counts.model_dump())}."
        for what, counts in (("Training", data.training), ("Held out", data.held_out))
    ]
    return "\n\n".join([_table(head, rows), *text])


def _file_name(name: str) -> str:
    """A hub data set's name, or the last part of a path."""
    return name if name.count("/") < 2 and not name.startswith((".", "/", "~")) else Path(name).name


def _licence(directory: Path) -> dict[str, str]:
    """`license…` of the card that is there (the base's, or ours that took it over), or by the licence's text."""
    card = directory / CARD_FILE
    if card.is_file():
        found = re.match(r"---\n(.*?\n)---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        try:
            header = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError:
            header = {}
        if isinstance(header, dict) and header.get("license"):
            return {k: str(header[k]) for k in ("license", "license_name", "license_link") if header.get(k)}
    for path in sorted(directory.glob("LICENSE*")):
        beginning = path.read_text(encoding="utf-8", errors="replace")[:2000].lower()
        for words, name in _LICENCES.items():
            if words.lower() in beginning:
                return {"license": name}
    return {"license": "unknown"}


def _licence_section(licence: dict[str, str]) -> str:
    name = licence.get("license_name") or licence["license"]
    if name == "unknown":
        return "## Licence\n\nSee the base model."
    link = f", see {licence['license_link']}" if "license_link" in licence else ""
    return f"## Licence\n\nThat of the base model: {name}{link}."
