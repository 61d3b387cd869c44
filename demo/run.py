"""The whole path on this machine: fit routers, look at them, serve dense and routed, ask both, show what was skipped.

Run by `make demo`; every command it uses is printed, and can be repeated by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tests.support.server import Server, ServerError, serve  # noqa: E402

OUTPUT = ROOT / ".demo"
BIN = Path(sys.executable).parent
CHECKPOINT = OUTPUT / "checkpoint"
#: SmolLM2-135M-Instruct, which pip brings, and routers for it.
MODEL, ROUTERS = "smollm2", HERE / "routers"
QUESTIONS = (
    "Give three tips for staying healthy, and say for each of them in one sentence why it helps.",
    "What is the capital of France, and what is it known for? Answer in two short sentences, please.",
    "Write a Python function that checks whether a word is a palindrome, and explain it in one sentence.",
)
REQUESTS = 16


class DemoError(RuntimeError):
    """Something the demo had to show is not there."""


def say(text: str) -> None:
    print(f"\n\033[1m==> {text}\033[0m", flush=True)


def command(*words: str | Path) -> None:
    """Print an installed command, and run it."""
    name, *rest = map(str, words)
    print("$", shlex.join([name, *rest]), flush=True)
    subprocess.run([str(BIN / name), *rest], check=True, cwd=ROOT)


def tune(model: str, data: str, checkpoint: Path) -> None:
    """A small run, so that it takes a minute or two; the routers that are served come with the demo, if it has some."""
    options = ["--max-samples", "20", "--measured-samples", "16", "--max-length", "96", "--patch-rank", "8"]
    options += ["--compare-static", "false"]  # two held-out requests would not tell them apart
    command("router-tuning", "fit", "--model", model, "--data", data, "--output", _short(checkpoint), *options)


def routed_checkpoint(model: str, data: str) -> Path:
    """What will be served: the demo's own routers on its own model, else what a minute of tuning gives."""
    say("1/5 Find layers that can be spared, fit routers and patches (all other weights stay as they are)")
    tune(model, data, tuned := OUTPUT / "tuned")
    if model != MODEL:
        return tuned
    say("2/5 Serve the routers that come with the demo: fitted by the same command on twenty times the requests")
    command("router-tuning", "export", "--model", model, "--routers", _short(ROUTERS), "--output", _short(CHECKPOINT))
    return CHECKPOINT


def base_directory(model: str) -> Path:
    """Where the base model lies, which is here by now."""
    from router_tuning.hub import local_model

    return local_model(model)


def show_log(log: Path, granularity: str) -> None:
    """What the plugin told about the checkpoint at load."""
    for line in log.read_text(errors="replace").splitlines():
        _, found, fact = line.partition(f"] {granularity}: ")
        if found:
            print(f"plugin: {fact}")


def has_chat_template(checkpoint: Path) -> bool:
    if (checkpoint / "chat_template.jinja").is_file():
        return True
    settings = checkpoint / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in json.loads(settings.read_text())


def held_out_prompts(data: str) -> list[str]:
    """Questions that training has not seen: it holds out the last rows of every file."""
    from router_tuning.data import read_sources, split_tail

    prompts = []
    for row in split_tail(read_sources([data]), 0.02)[1]:
        first = (row.get("messages") or [{}])[0]
        prompt = first.get("content") if first.get("role") == "user" else row.get("prompt")
        if isinstance(prompt, str) and 0 < len(prompt) < 1000:
            prompts.append(prompt)
    return prompts[:REQUESTS] or list(QUESTIONS)


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    #: of the routed layers, how many this request kept; None if the model has no routers
    kept: float | None


def ask(server: Server, prompt: str, chat: bool, max_tokens: int) -> Answer:
    """A greedy answer over the OpenAI API: chat where the tokenizer has a template."""
    body: dict[str, Any] = {"model": "demo", "max_tokens": max_tokens, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    request = urllib.request.Request(
        f"{server.url}/v1/{'chat/completions' if chat else 'completions'}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = json.load(response)
    choice = answer["choices"][0]
    text = choice["message"]["content"] if chat else choice["text"]
    about = (answer.get("kv_transfer_params") or {}).get("mod") or {}
    return Answer(text.strip(), answer["usage"]["completion_tokens"], about.get("kept_ratio"))


@dataclass(frozen=True)
class Answers:
    """What one server said to all questions."""

    shown: list[Answer]
    tokens_per_second: float


def ask_all(server: Server, prompts: list[str], chat: bool) -> Answers:
    """The shown questions one by one, the held-out ones together."""
    shown = [ask(server, question, chat, 60) for question in QUESTIONS]
    start = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt, chat, 32), prompts))
    return Answers(shown, sum(answer.tokens for answer in answers) / (time.monotonic() - start))


def counters(server: Server) -> dict[int, tuple[float, float]]:
    """(kept, routed) so far, per routed layer, from the server's /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[int, float]] = {"vllm:mod_kept_total": {}, "vllm:mod_routed_total": {}}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            if sample.name in found:
                layer = int(sample.labels["layer"])
                found[sample.name][layer] = found[sample.name].get(layer, 0) + sample.value
    kept, routed = found.values()
    return {layer: (kept.get(layer, 0), total) for layer, total in sorted(routed.items())}


def show_kept(before: dict[int, tuple[float, float]], after: dict[int, tuple[float, float]]) -> None:
    """The table of kept ratios between two readings of the counters."""
    rows = {}
    for layer, (kept, routed) in after.items():
        kept_before, routed_before = before.get(layer, (0, 0))
        rows[f"{layer}"] = (kept - kept_before, routed - routed_before)
    rows["all"] = (sum(kept for kept, _ in rows.values()), sum(routed for _, routed in rows.values()))
    if not rows["all"][1]:
        raise DemoError("/metrics does not count vllm:mod_kept_total and vllm:mod_routed_total: was the plugin loaded?")
    print("Attention computed by each routed layer, one decision per request and layer:")
    print("layer  kept / routed  ratio")
    for layer, (kept, routed) in rows.items():
        ratio = kept / routed if routed else 0
        print(f"{layer:<5}  {kept:>4g} / {routed:<6g}  {ratio:>5.2f}  {'#' * round(20 * ratio)}")


def show_answers(dense: Answers, routed: Answers) -> None:
    """Side by side."""
    for question, before, after in zip(QUESTIONS, dense.shown, routed.shown, strict=True):
        kept = "" if after.kept is None else f" (kept {after.kept:.2f} of the routed layers)"
        print(f"Q: {question}\n  dense:  {_in_one_line(before.text)}\n  routed: {_in_one_line(after.text)}{kept}\n")


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def served(checkpoint: Path, log: str) -> Iterator[Server]:
    config = json.loads((checkpoint / "config.json").read_text())
    longest = str(min(1024, config["max_position_embeddings"]))
    flags = ["--served-model-name", "demo", "--max-model-len", longest, "--kv-cache-memory-bytes", str(256 << 20)]
    flags += ["--enforce-eager"]  # a quicker start, and no C++ compiler needed
    flags += ["--dtype", "float32"]  # bfloat16 takes several times as long on CPUs without AVX512 or AMX
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    print("$", shlex.join(["vllm", "serve", _short(checkpoint), *flags]), f"   # log: {_short(OUTPUT)}/{log}")
    print("waiting for /health, about a minute ...", flush=True)
    start = time.monotonic()
    with serve(checkpoint, *flags, log=OUTPUT / log, env=env, timeout=420) as server:
        print(f"healthy after {time.monotonic() - start:.0f} s at {server.url}", flush=True)
        yield server
    print("server stopped")


def serve_and_ask(base: Path, checkpoint: Path, prompts: list[str]) -> None:
    chat = has_chat_template(checkpoint)
    say("4/5 Serve the base model as it is, and ask")
    with served(base, "dense.log") as server:
        dense = ask_all(server, prompts, chat)
    say("5/5 Serve the routed checkpoint (no option is about routing), ask the same, and show what was skipped")
    with served(checkpoint, "routed.log") as server:
        show_log(server.log, json.loads((checkpoint / "config.json").read_text())["mod_config"]["granularity"])
        before = counters(server)
        routed = ask_all(server, prompts, chat)
        after, freed = counters(server), server.totals().get("vllm:mod_kv_pages_freed_total", 0)
    print()
    show_answers(dense, routed)
    show_kept(before, after)
    print(f"KV pages that skipped layers gave back: {freed:g}")
    print(
        f"{len(prompts)} held-out questions at once: {dense.tokens_per_second:.0f} tokens/s dense, "
        f"{routed.tokens_per_second:.0f} routed (one small run; benchmarks/ measures speed)"
    )


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="local directory or hub name of a supported model")
    parser.add_argument("--data", default=_short(HERE / "data.jsonl.gz"), help="instruction data: a file or hub name")
    args = parser.parse_args()
    os.chdir(ROOT)
    if Path(args.model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stop the server on `kill`, too
    start = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    try:
        checkpoint = routed_checkpoint(args.model, args.data)
        say("3/5 What the checkpoint routes")
        command("vllm-mod", "inspect", _short(checkpoint))
        serve_and_ask(base_directory(args.model), checkpoint, held_out_prompts(args.data))
    except subprocess.CalledProcessError as error:
        print(f"demo: {Path(error.cmd[0]).name} failed with status {error.returncode}", file=sys.stderr)
        return 1
    except (DemoError, ServerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the server is stopped", file=sys.stderr)
        return 130
    say(f"Done in {time.monotonic() - start:.0f} s. The checkpoint: {_short(checkpoint)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
