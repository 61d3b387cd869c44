"""How long greedy answers stay those of the dense model, and whether they end in a loop: vLLM answers held-out
prompts with the base model, the checkpoint, and whatever it is to be compared with.

  agreed     share of the dense answer's tokens before the first that differs, mean over requests
  identical  share of requests whose whole answer is the dense one
  repeating  share of answers whose end says the same again and again: up to 16 tokens, three times or more, and 24
             tokens at least

An answer ends at the end-of-sequence token, or after `--tokens`. Errors are over requests; `agreed_above_routed` and
`repeating_above_dense` are means of paired differences. After the first difference two answers may both be right: this
says how far a model was moved, not how good its answers are; but no answer that repeats itself is.

`--temperature`, `--repetition-penalty`: how many loops are left as answers are served. Sampled ones are compared by
these alone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_tuning.answers import repeating
from router_tuning.hub import local_model

from .lib.common import (
    IN_PROCESS,
    command,
    command_line,
    cpu_flags,
    isolated,
    machine,
    markdown_table,
    output_argument,
    progress,
    run_command,
    write_json,
)
from .lib.errors import above, mean_and_error
from .lib.held_out import check_checkpoint, held_out, held_out_arguments, names_of, prompts_of

Answers = Sequence[Sequence[int]]


def parse_args(argv: Sequence[str] | None = None) -> Any:
    parser = command_line("greedy", __doc__)
    parser.add_argument("checkpoint", type=Path, help="what `router-tuning train` or `fit` wrote")
    parser.add_argument("--model", required=True, help="its base model: a directory, a hub name, or smollm2")
    parser.add_argument("--data", nargs="+", required=True, help="files whose last part was held out in training")
    held_out_arguments(parser, samples=100)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="further checkpoints of the same base")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy (default); above: sampled, request n by seed n"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="vLLM's (default: %(default)s, none)")
    output_argument(parser, "greedy/result.json")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.samples < 2:
        parser.error("--tokens: 1 or more, --samples: 2 or more")
    if not (0 <= args.temperature < math.inf and 0 < args.repetition_penalty < math.inf):
        parser.error("--temperature: 0 or more, --repetition-penalty: above 0")
    return args


def generate(
    model: Path, prompts: list[list[int]], tokens: int, longest: int, sampling: Mapping[str, float]
) -> list[list[int]]:
    """Answers of vLLM, in this process. sampling: of `SamplingParams`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model), enforce_eager=True, max_model_len=longest + tokens, block_size=32, kv_cache_memory_bytes=512 << 20,
        max_num_seqs=32, **cpu_flags(),
    )  # fmt: skip
    params = [SamplingParams(seed=number, max_tokens=tokens, **sampling) for number in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agreed(dense: Sequence[int], other: Sequence[int]) -> float:
    """Share of `dense` before the first token that `other` has otherwise, or lacks."""
    pairs = zip(dense, other, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(dense), len(other)))
    return same / len(dense)


def compare(answers: Mapping[str, Answers], sampled: bool = False) -> dict[str, dict[str, float]]:
    """System -> its row; answers: by system, `dense` and `routed` among them, two requests or more."""
    looped = {name: [float(repeating(answer)) for answer in found] for name, found in answers.items()}
    loops = {
        name: {"repeating": round(statistics.mean(found), 4)}
        | _entries("repeating_above_dense", above(found, looped["dense"]))
        for name, found in looped.items()
        if name != "dense"
    }
    if sampled:
        return loops
    shares = {
        name: [agreed(dense, own) for dense, own in zip(answers["dense"], found, strict=True)]
        for name, found in answers.items()
        if name != "dense"
    }
    rows = {}
    for name, found in shares.items():
        same = [list(a) == list(b) for a, b in zip(answers["dense"], answers[name], strict=True)]
        rows[name] = (
            _entries("agreed", mean_and_error(found))
            | _entries("agreed_above_routed", above(found, shares["routed"]))
            | {"identical": round(statistics.mean(same), 4)}
            | loops[name]
        )
    return rows


def _entries(name: str, found: tuple[float, float | None]) -> dict[str, float]:
    mean, error = found
    assert error is not None  # of two requests or more
    return {name: round(mean, 4), f"{name}_standard_error": round(error, 4)}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.model = local_model(args.model)
    checkpoints = {"routed": args.checkpoint} | names_of(args.others, ("dense", "routed"))
    for checkpoint in checkpoints.values():
        check_checkpoint(checkpoint, args.model)
    prompts = prompts_of(held_out(args, checkpoints.values()))
    systems = {"dense": args.model} | checkpoints
    answers = {}
    sampling = {"temperature": args.temperature, "repetition_penalty": args.repetition_penalty}
    for name, path in systems.items():
        progress(f"answers of {name}")
        answers[name] = isolated(generate, path, prompts, args.tokens, args.max_length, sampling, **IN_PROCESS)
    rows = compare(answers, sampled=args.temperature > 0)
    lengths = statistics.mean(len(answer) for answer in answers["dense"])
    repeated = statistics.mean(map(repeating, answers["dense"]))
    result = {
        "requests": len(prompts), "dense_answer_tokens": round(lengths, 1), "dense_repeating": round(repeated, 4),
        "systems": rows,
    }  # fmt: skip
    write_json(args.output, {"command": command("greedy"), "machine": machine(), "result": result})
    table = [[name, *row.values()] for name, row in rows.items()]
    progress(markdown_table(["system", *next(iter(rows.values()))], table))
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "greedy", "stopped; nothing is written")
