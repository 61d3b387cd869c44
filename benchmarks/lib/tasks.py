"""The paper's nine tasks and lm-eval on them, each system in a process of its own.

Shots are those of the authors' evaluation scripts (LLM-Drop, `scripts/benchmark/benchmark_lm_eval.sh`); metrics are
what their tables show: accuracy by length-normalised likelihood where lm-eval has it, GSM8K by its strict match.
Prompts longer than the model allows are cut on the left by lm-eval, so the first shots are lost; how many is counted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_mod.config import ConfigError

from .common import routed_pairs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    shots: int
    metric: str
    #: what guessing gets: 1 / answers
    chance: float
    filter: str = "none"


TASKS = {
    "boolq": Task(0, "acc", 0.5),
    "rte": Task(0, "acc", 0.5),
    "openbookqa": Task(0, "acc_norm", 0.25),
    "piqa": Task(0, "acc_norm", 0.5),
    "mmlu": Task(5, "acc", 0.25),
    "winogrande": Task(5, "acc", 0.5),
    "gsm8k": Task(5, "exact_match", 0.0, "strict-match"),
    "hellaswag": Task(10, "acc_norm", 0.25),
    "arc_challenge": Task(25, "acc_norm", 0.25),
}


@dataclass(frozen=True)
class Load:
    """What is evaluated, the same for every system. Paths are absolute: processes change their directory."""

    tasks: Sequence[str]
    limit: int | None
    data_dir: str | None
    include_path: str | None
    generated: int | None = None  #: instead of `limit`, for tasks whose answers are generated
    min_shots: int = 0  #: of tasks that the paper gives fewer

    def shots(self, name: str) -> int:
        return max(TASKS[name].shots, self.min_shots)

    def parts(self, name: str, task: Any) -> tuple[list[Any], int | None]:
        """What of a task is scored: its parts, and the number of documents of each (None: all), about `limit` in all.

        With fewer documents than parts, one of each of some parts, spread evenly.
        """
        limit = self.generated if self.generated and TASKS[name].metric == "exact_match" else self.limit
        found = leaves(task)
        if limit is None:
            return found, None
        if limit < len(found):
            return [found[i * len(found) // limit] for i in range(limit)], 1
        return found, round(limit / len(found))


def load_tasks(load: Load) -> tuple[Any, dict[str, Any]]:
    """(lm-eval's task manager, task -> lm-eval's object of it), the documents read. Raises ConfigError.

    Stock tasks name data sets like `aps/super_glue`; `datasets` takes a directory of that name where there is one, so
    the process moves to `data_dir`. Where a training split has too few documents for the shots, these are drawn from
    the split that is scored, which lm-eval allows by leaving the scored document out.
    """
    from lm_eval.tasks import TaskManager

    if load.data_dir is not None:
        os.chdir(load.data_dir)
    manager, found = TaskManager(include_path=load.include_path), {}
    for name in load.tasks:
        try:
            loaded = manager.load([name])
            task = loaded["groups"].get(name) or loaded["tasks"][name]
            for part in leaves(task):
                if _too_few(part, load.shots(name)):
                    log.warning("%s: too few training documents, shots are other scored ones", part.task_name)
                    part.sampler.replace_df(list(part.eval_docs))
        except Exception as error:  # whatever `datasets`, the hub or a task's own code raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            where = load.data_dir or "the hub (or its cache)"
            raise ConfigError(
                f"task {name}: its documents cannot be read from {where}: {reason}; put them there "
                "(--data-dir: directories named as lm-eval's task names them), or leave the task out of --tasks"
            ) from None
        found[name] = task
    return manager, found


def leaves(task: Any) -> list[Any]:
    """MMLU is a group of 57."""
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _too_few(task: Any, shots: int) -> bool:
    return shots > 0 and len(task.sampler.df) < shots


def check_tasks(load: Load) -> dict[str, int]:
    """Task -> documents that will be scored. Reads all of them, before any long work."""
    _, found = load_tasks(load)
    counts = {}
    for name, task in found.items():
        parts, each = load.parts(name, task)
        counts[name] = sum(min(len(part.eval_docs), each or 1 << 60) for part in parts)
    return counts


def scores(lm: Any, load: Load, kept: Any = None) -> dict[str, Any]:
    """Task -> {"shots", "documents": [part, number] of each, "values": its metric, "likelihoods": of each of its
    requests, "lengths": the tokens that each request needs, those of its answer included}.

    kept: called before and after each task, gives the engine's counters so far.
    """
    from lm_eval import simple_evaluate

    manager, found = load_tasks(load)
    results: dict[str, Any] = {}
    for name, task in tqdm(found.items(), desc="tasks"):
        settings, shots, (parts, each) = TASKS[name], load.shots(name), load.parts(name, task)
        before = kept() if kept else None
        output = simple_evaluate(
            model=lm, tasks=parts, num_fewshot=shots, limit=each, bootstrap_iters=0, task_manager=manager
        )
        numbers, documents = [], []
        for leaf in sorted(output["samples"]):
            for document in output["samples"][leaf]:
                if document["filter"] == settings.filter:
                    numbers.append([leaf, document["doc_id"]])
                    documents.append(document)
        results[name] = {
            "shots": shots,
            "documents": numbers,
            "values": [float(d[settings.metric]) for d in documents],
            "likelihoods": [_likelihoods(d["resps"]) for d in documents],
            "lengths": _lengths(lm, documents),
        }
        if kept:
            now = kept()
            results[name]["kept"], results[name]["routed"] = (now[k] - before[k] for k in ("kept", "routed"))
    return results


def _likelihoods(responses: Sequence[Any]) -> list[float]:
    """Log-likelihoods of the choices; nothing for a generated answer."""
    return [float(r[0][0]) for r in responses if isinstance(r[0], (tuple, list))]


def _lengths(lm: Any, documents: Sequence[dict[str, Any]]) -> list[int]:
    requests = [r for d in documents for r in d["arguments"]]
    texts = [r[0] + r[1] if isinstance(r[1], str) else r[0] for r in requests]
    room = [0 if isinstance(r[1], str) else lm.max_gen_toks - 1 for r in requests]
    return [len(lm.tok_encode(t)) + more for t, more in zip(texts, room, strict=True)]


def vllm_scores(model: str, mod: dict[str, Any] | None, load: Load, model_args: dict[str, Any]) -> dict[str, Any]:
    """`lm_eval --model vllm` on a checkpoint; with the kept ratio of each task from the engine's own counters."""
    from lm_eval.models.vllm_causallms import VLLM

    settings = dict(model_args)
    if mod is not None:
        settings["additional_config"] = {"mod": mod}
    lm = VLLM(pretrained=model, batch_size="auto", disable_log_stats=False, **settings)

    def kept() -> dict[str, float]:
        return {name: sum(pairs.values()) for name, pairs in routed_pairs(lm.model).items()}

    return {"tasks": scores(lm, load, kept), "max_length": lm.max_length}


def reference_scores(checkpoint: str, load: Load, max_length: int) -> dict[str, Any]:
    """The same by lm-eval's Hugging Face backend on the float32 reference."""
    from .reference_lm import ReferenceLM

    return {"tasks": scores(ReferenceLM(Path(checkpoint), max_length), load)}
