"""Does a routed checkpoint start and answer on a GPU with vLLM's default flags? Compiled, CUDA graphs and all.

A tiny Llama with random weights per granularity, each in a process of its own, and the stock model beside them. Every
answer is compared with the float32 reference on the CPU, given the same tokens: how often the served token is the
reference's choice, how far its log-probability is off, and how often a request's layers are those that the reference
keeps. Kernels of a GPU round otherwise, and bfloat16 more: the stock model's line says what that alone does. The last
line is

  {"started": [...], "failed": {name: reason}, "agreement": {name: share of tokens}, "decisions": {name: share}}
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.support.models import routed_checkpoint, tiny_llama

from .lib.common import (
    command,
    command_line,
    machine,
    metric_totals,
    output_argument,
    progress,
    run_command,
    write_json,
)

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "max_position_embeddings": 2048}  # fmt: skip
LAYERS = [1, 2, 4, 5, 6]
WINDOW = {"version": 2, "window": 64}
CASES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "stock": None,
    "attn_sequence": ("attn_sequence", {}),
    "attn_sequence, window": ("attn_sequence", WINDOW),
    "attn_sequence, window, patch": ("attn_sequence", WINDOW | {"patch": {"rank": 8}}),
    "block_sequence, window": ("block_sequence", WINDOW),
    "mlp_sequence, window": ("mlp_sequence", WINDOW),
    "attn_token": ("attn_token", {}),
    "block_token": ("block_token", {}),
    "mlp_token": ("mlp_token", {}),
    "attn_static": ("attn_static", {}),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("gpu_check", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="default: all")
    parser.add_argument("--at-once", type=int, default=5, help="engines (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--v2", action="store_true", help="with vLLM's Model Runner V2")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs")
    output_argument(parser, "gpu_check/result.json")
    return parser.parse_args(argv)


def prompts() -> list[list[int]]:
    """Shorter and longer than the window, some with the same beginning."""
    rng = random.Random(0)
    found = [[rng.randrange(6, 260) for _ in range(n)] for n in (1, 17, 63, 64, 65, 100, 200, 400, 800, 1500)]
    return found + [found[-1][:300] + tail for tail in found[1:6]]


def serve(checkpoint: str, dtype: str, v2: bool, eager: bool) -> dict[str, Any]:
    """Answers of one engine, twice: the second time prefixes are found in the cache, where it is on."""
    if v2:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    begin = time.monotonic()
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint, dtype=dtype, max_model_len=2048, gpu_memory_utilization=0.15, disable_log_stats=False,
        enforce_eager=eager,
    )  # fmt: skip
    started = time.monotonic() - begin
    params = SamplingParams(temperature=0, max_tokens=32, logprobs=0, ignore_eos=True)
    answers: list[list[dict[str, Any]]] = []
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
        answers.append([_answer(output) for output in outputs])
    metrics = metric_totals(llm)
    wanted = ("vllm:mod_kept", "vllm:mod_routed", "vllm:mod_kv_pages_freed", "vllm:prefix_cache_hits")
    return {
        "start_s": round(started, 1),
        "answers": answers,
        "metrics": {k: metrics[k] for k in wanted if k in metrics},
    }


def _answer(output: Any) -> dict[str, Any]:
    [found] = output.outputs
    tokens = list(found.token_ids)
    logprobs = [step[token].logprob for step, token in zip(found.logprobs, tokens, strict=True)]
    said = (output.kv_transfer_params or {}).get("mod")
    return {"tokens": tokens, "logprobs": logprobs, "skipped": said and said["skipped_layers"]}


def compared(checkpoint: Path, routed: bool, found: dict[str, Any]) -> dict[str, Any]:
    """With the float32 reference, which is given prompt and answer and decides by itself."""
    import torch

    from router_tuning.model import load_base, load_reference, reference_decisions, reference_logits

    torch.set_num_threads(2)  # several cases are compared at once
    model = load_reference(checkpoint) if routed else load_base(checkpoint, torch.float32)
    same, off, decisions = [], [], []
    for answers in found["answers"]:
        for prompt, answer in zip(prompts(), answers, strict=True):
            ids, first = prompt + answer["tokens"], len(prompt) - 1
            if routed:
                logits = reference_logits(model, ids, len(prompt))
            else:
                with torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            expected, tokens = logits[first:-1].float().log_softmax(-1), torch.tensor(answer["tokens"])
            same += (expected.argmax(-1) == tokens).tolist()
            off += (expected.gather(1, tokens[:, None])[:, 0] - torch.tensor(answer["logprobs"])).abs().tolist()
            if answer["skipped"] is not None:
                taken = reference_decisions(model)
                decisions += [bool(taken[i].all()) == (i not in answer["skipped"]) for i in LAYERS]
    return {
        "agreement": round(statistics.mean(same), 4),
        "logprob_off_median": round(statistics.median(off), 4),
        "logprob_off_p99": round(sorted(off)[int(0.99 * len(off))], 4),
        "decisions": round(statistics.mean(decisions), 4) if decisions else None,
    }


def case(name: str, directory: str, dtype: str, v2: bool, eager: bool) -> dict[str, Any]:
    made, base = Path(directory) / name.replace(", ", "-"), Path(directory) / "base"
    wanted = CASES[name]
    checkpoint = base if wanted is None else routed_checkpoint(base, made, wanted[0], LAYERS, **wanted[1])
    try:
        found = serve(str(checkpoint), dtype, v2, eager)
        progress(f"{name}: served; started after {found['start_s']} s, {found['metrics']}")
        return {k: v for k, v in found.items() if k != "answers"} | compared(checkpoint, wanted is not None, found)
    except Exception as error:  # not all of vLLM's can be pickled
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    found: dict[str, Any] = {}
    record = {"command": command("gpu_check"), "machine": machine()}
    with tempfile.TemporaryDirectory() as directory:
        tiny_llama(Path(directory) / "base", **SHAPE)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.at_once, mp_context=context, max_tasks_per_child=1) as pool:
            running = {pool.submit(case, name, directory, args.dtype, args.v2, args.eager): name for name in args.cases}
            for done in as_completed(running):
                found[running[done]] = done.result()
                progress(f"{running[done]}: {json.dumps(done.result())}")
                write_json(args.output, record | {"cases": found})  # what is done stays
    failed = {name: each["failed"] for name, each in found.items() if "failed" in each}
    line: dict[str, Any] = {"started": [name for name in args.cases if name not in failed], "failed": failed}
    for key in ("agreement", "decisions"):
        line[key] = {name: each[key] for name, each in found.items() if each.get(key) is not None}
    print(json.dumps(line))


if __name__ == "__main__":
    run_command(main, "gpu_check", "interrupted; what was done is in the result file")
