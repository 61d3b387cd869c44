"""The whole path on this machine: train routers, look at them, serve them, ask, and show what was skipped.

Run by `make demo`; every command it uses is printed, and can be repeated by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tests.support.server import Server, ServerError, serve  # noqa: E402

OUTPUT = ROOT / ".demo"
BIN = Path(sys.executable).parent
QUESTION = "Give three tips for staying healthy."
REQUESTS = 32


class DemoError(RuntimeError):
    """Something the demo had to show is not there."""


def say(text: str) -> None:
    print(f"\n\033[1m==> {text}\033[0m", flush=True)


def command(*words: str | Path) -> None:
    """Print an installed command, and run it."""
    name, *rest = map(str, words)
    print("$", shlex.join([name, *rest]), flush=True)
    subprocess.run([str(BIN / name), *rest], check=True, cwd=ROOT)


def train(model: str, data: str, checkpoint: Path) -> None:
    say("1/4 Train routers (every other parameter is frozen)")
    options = ["--granularity", "attn_sequence", "--target-capacity", "0.5"]
    options += ["--max-train-samples", "1536", "--max-length", "256"]  # minutes on two cores
    command("router-tuning", "train", "--model", model, "--data", data, "--output", _short(checkpoint), *options)


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
    return prompts[:REQUESTS] or [QUESTION]


def ask(server: Server, prompt: str, chat: bool, max_tokens: int) -> str:
    """A greedy answer over the OpenAI API: chat where the tokenizer has a template."""
    body: dict[str, Any] = {"model": "demo", "max_tokens": max_tokens, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    request = urllib.request.Request(
        f"{server.url}/v1/{'chat/completions' if chat else 'completions'}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["message"]["content"] if chat else choice["text"]


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


def serve_and_ask(checkpoint: Path, prompts: list[str]) -> None:
    say("3/4 Serve it (no option is about routing: the checkpoint says what is routed)")
    config = json.loads((checkpoint / "config.json").read_text())
    longest = str(min(1024, config["max_position_embeddings"]))
    flags = ["--served-model-name", "demo", "--max-model-len", longest, "--kv-cache-memory-bytes", str(256 << 20)]
    flags += ["--enforce-eager"]  # a quicker start, and no C++ compiler needed
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    print("$", shlex.join(["vllm", "serve", _short(checkpoint), *flags]), f"   # log: {_short(OUTPUT)}/serve.log")
    print("waiting for /health, about a minute ...", flush=True)
    start = time.monotonic()
    with serve(checkpoint, *flags, log=OUTPUT / "serve.log", env=env, timeout=420) as server:
        print(f"healthy after {time.monotonic() - start:.0f} s at {server.url}")
        show_log(server.log, config["mod_config"]["granularity"])
        say("4/4 Ask, and show what was skipped")
        chat = has_chat_template(checkpoint)
        before = counters(server)
        print(f"Q: {QUESTION}\nA: {ask(server, QUESTION, chat, 60).strip()}\n")
        print(
            f"{len(prompts)} held-out questions of the training data, so that the ratio says something ...", flush=True
        )
        for prompt in prompts:
            ask(server, prompt, chat, 8)
        show_kept(before, counters(server))
    print("server stopped")


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=_short(HERE / "model"), help="local directory or hub name of a Llama")
    parser.add_argument("--data", default=_short(HERE / "data.jsonl.gz"), help="instruction data: a file or hub name")
    args = parser.parse_args()
    os.chdir(ROOT)
    if Path(args.model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stop the server on `kill`, too
    start = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    checkpoint = OUTPUT / "checkpoint"
    try:
        train(args.model, args.data, checkpoint)
        say("2/4 What the checkpoint routes")
        command("vllm-mod", "inspect", _short(checkpoint))
        serve_and_ask(checkpoint, held_out_prompts(args.data))
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
