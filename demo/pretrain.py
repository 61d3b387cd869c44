r"""Make the small pretrained Llama that `make demo` tunes routers on, its instruction data, and their numbers.

    python demo/pretrain.py train --data DATA --tokenizer TOKENIZER --output demo/model --minutes 45
    python demo/pretrain.py rows  --data DATA --output demo/data.jsonl.gz
    python demo/pretrain.py rows  --data DATA --output benchmarks/data/chats.jsonl.gz --without demo/data.jsonl.gz \
        --rows 3000 2400 1300 300 250 1100
    python demo/pretrain.py eval  --data DATA --model demo/model

DATA holds `train/*.jsonl.gz` (rows with `messages`) and `text/*.jsonl.xz` (rows with `text`); TOKENIZER is a directory
with a tokenizer and a chat template. The last 2 % of the rows of every file are never trained on. See demo/MODEL.md.
"""

import argparse
import copy
import gzip
import json
import lzma
import math
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# Permissive or public domain only; the licences are in demo/MODEL.md. `rows` takes as many files as ROWS names.
INSTRUCTIONS = ("gsm8k_train", "gpteacher_code_4k", "gpteacher_roleplay_2k", "oasst1_953", "self_instruct_human")
INSTRUCTIONS += ("llms_from_scratch_1k", "taskmaster4_coffee")
ROWS = (1000, 800, 350, 150, 200)
BOOKS = ("classic_children_adventure", "english_novels")
DROP = {2: 0.2, 3: 0.225, 4: 0.25, 5: 0.275, 6: 0.3}  # layer -> share of samples whose attention output is dropped


def load(data, name, heldout):
    """The training rows of one file, or its held-out last 2 %."""
    [path] = data.glob(f"*/{name}.jsonl.*")
    with (lzma if path.suffix == ".xz" else gzip).open(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    cut = int(len(rows) * 0.98)
    return [r for r in (rows[cut:] if heldout else rows[:cut]) if r.get("subset") != "other"]  # "other": not English


def encode(rows, tokenizer, rng, slices=24, size=5000):
    """Token ids, one list per document: a rendered conversation, or a random slice of a book."""
    texts = []
    for row in rows:
        if "messages" in row:
            texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        else:
            starts = (rng.randrange(max(1, len(row["text"]) - size)) for _ in range(slices))
            texts += [row["text"][s : s + size].partition(" ")[2] for s in starts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def pack(documents, length):
    """Windows of `length` tokens. A document cut by the end of a window is repeated whole in the next if it fits."""
    windows, window = [], []
    for doc in documents:
        while len(window) + len(doc) >= length:
            space = length - len(window)
            windows.append(window + doc[:space])
            if not window or len(doc) > length or len(doc) == space:
                doc = doc[space:]
            window = []
        window = window + doc
    return torch.tensor(windows)


def batches(data, tokenizer, seed, tokens):
    """A function from a step's number to its batch, half conversations, half books."""
    rng, pools = random.Random(seed), {256: [], 512: []}
    kinds = (INSTRUCTIONS, BOOKS)
    sources = [encode([row for n in names for row in load(data, n, False)], tokenizer, rng) for names in kinds]
    for documents in sources:
        rng.shuffle(documents)
        for length, pool in pools.items():
            pool.append(pack(documents, length))

    def batch(step):
        length = 512 if step % 4 == 3 else 256
        half, picked = tokens // length // 2, []
        for pool in pools[length]:
            epoch, at = divmod(step * half, len(pool) // half * half)
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + epoch))
            picked.append(pool[order[at : at + half]])
        ids = torch.cat(picked)
        ids[::2] = torch.cat([torch.full((len(ids[::2]), 1), 0), ids[::2, :-1]], 1)  # half start with <|bos|>, 0
        return ids

    return batch


def new_model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}
    words = {"vocab_size": 4096, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **words, dtype=torch.float32))


def drop_attention(model, shares, generator=None):
    """Zero the attention output of a share of the samples in some layers; returns the hooks, to be removed."""

    def zero(share, module, args, output):
        keep = torch.rand(len(output[0]), 1, 1, generator=generator) >= share
        return (output[0] * keep.to(output[0].dtype), *output[1:])

    return [model.model.layers[i].self_attn.register_forward_hook(partial(zero, p)) for i, p in shares.items()]


def save_model(model, output, tokenizer):
    """bf16 copy of the model and the tokenizer's files; every file appears at once or not at all."""
    staging = output / ".saving"
    staging.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(staging)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, staging / name)
    for file in staging.iterdir():
        os.replace(file, output / file.name)
    staging.rmdir()


def train(args):
    batch = batches(args.data, AutoTokenizer.from_pretrained(args.tokenizer), args.seed, args.batch_tokens)
    model = new_model(args.seed)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step, elapsed, losses = 0, 0.0, []
    if args.state.exists():
        weights, moments, step, elapsed = torch.load(args.state, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)

    def save():
        unfinished = args.state.with_name(args.state.name + ".unfinished")
        torch.save((model.state_dict(), optimizer.state_dict(), step, elapsed), unfinished)
        os.replace(unfinished, args.state)
        save_model(model, args.output, args.tokenizer)
        print(f"saved: {step} steps, {step * args.batch_tokens} tokens, {elapsed:.0f} s", flush=True)

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))  # finish the step, save, leave
    generator = torch.Generator()
    drop_attention(model.train(), DROP, generator)
    started, saved = time.monotonic() - elapsed, elapsed
    while not stop and (done := step / args.steps if args.steps else elapsed / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(done / 0.03 + 0.01, 0.02 + 0.49 * (1 + math.cos(math.pi * done)), 1)
        generator.manual_seed(args.seed * 1_000_003 + step)
        ids = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.item())
        elapsed = time.monotonic() - started
        if step % 20 == 0:
            speed, mean = step * args.batch_tokens / elapsed, sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step} loss {mean:.3f} lr {group['lr']:.1e} {elapsed:.0f} s {speed:.0f} tok/s", flush=True)
        if elapsed - saved > 60 * args.save_minutes:
            save()
            saved = elapsed
    save()


def write_rows(args):
    """Training rows shuffled by seed, then (the last 5 % of the file) rows of the held-out tails."""
    rng, parts = random.Random(args.seed), ([], [])
    with gzip.open(args.without, "rt", encoding="utf-8") if args.without else nullcontext([]) as f:
        taken = {repr(json.loads(line)["messages"]) for line in f}
    for name, count in zip(INSTRUCTIONS, args.rows, strict=False):
        for heldout, wanted in ((False, count - count // 20), (True, count // 20)):
            rows = [r for r in load(args.data, name, heldout) if sum(len(m["content"]) for m in r["messages"]) <= 2000]
            rows = [r for r in rows if repr(r["messages"]) not in taken]
            parts[heldout].extend(rng.sample(rows, min(wanted, len(rows))))
    rows = [row for part in parts for row in rng.sample(part, len(part))]
    with open(args.output, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as f:
        for row in rows:
            row.pop("subset", None)
            f.write((json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
    print(f"{len(parts[0])} training rows, then {len(parts[1])} held-out rows, {args.output.stat().st_size} bytes")


@torch.inference_mode()
def evaluate(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    heldout = {}
    for name in INSTRUCTIONS + BOOKS:
        documents = encode(load(args.data, name, True), tokenizer, random.Random(args.seed), slices=6)
        heldout[name] = [torch.tensor([doc[:400]]) for doc in documents[:25]]

    def perplexity(names, without=()):
        hooks = drop_attention(model, dict.fromkeys(without, 1.0))
        texts = [ids for name in names for ids in heldout[name]]
        total = sum(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in texts)
        for hook in hooks:
            hook.remove()
        return math.exp(total / sum(ids.shape[1] - 1 for ids in texts))

    print("perplexity:", {name: round(perplexity([name]), 1) for name in heldout})
    skips = [(i,) for i in range(model.config.num_hidden_layers)] + [(4, 5), (5, 6), (4, 5, 6), (3, 4, 5, 6)]
    for kind, names in (("conversations", INSTRUCTIONS), ("books", BOOKS)):
        base = perplexity(names)
        times = {skip: round(perplexity(names, skip) / base, 3) for skip in skips}
        print(f"{kind}: perplexity {base:.2f}, times this without the attention of: {times}")
    for question in args.ask:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        print(tokenizer.decode(model.generate(**prompt, max_new_tokens=80, do_sample=False)[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run, name, text):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--data", type=Path, required=True, help="directory with train/ and text/")
        sub.add_argument("--seed", type=int, default=0, help="weights, order of the data, dropped attentions")
        sub.add_argument("--threads", type=int, default=1, help="CPU threads")
        return sub.add_argument

    option = command(train, "train", "pretrain; run again with the same --state to go on after a stop")
    option("--tokenizer", type=Path, required=True, help="directory with tokenizer.json and a chat template")
    option("--output", type=Path, required=True, help="model directory, rewritten at every save")
    option("--state", type=Path, default="pretrain-state.pt", help="weights, optimizer and progress")
    option("--minutes", type=float, default=45, help="time to train; the schedule follows the clock")
    option("--steps", type=int, help="train this many steps instead: the same weights whatever the speed")
    option("--save-minutes", type=float, default=4, help="time between saves")
    option("--batch-tokens", type=int, default=2048, help="tokens per step, 1024 or more; sequences of 256 or 512")
    option("--lr", type=float, default=3e-3, help="highest learning rate")
    option = command(write_rows, "rows", "write instruction rows")
    option("--output", type=Path, required=True, help="a .jsonl.gz file")
    option("--rows", type=int, nargs="+", default=ROWS, help="of each file, in the order of INSTRUCTIONS; all it has")
    option("--without", type=Path, help="a .jsonl.gz file none of whose conversations is taken")
    option = command(evaluate, "eval", "perplexity on held-out rows, with and without each attention")
    option("--model", type=Path, required=True, help="model directory")
    option("--ask", nargs="*", default=[], help="questions to answer greedily")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
