"""A few made-up documents of stock lm-eval tasks, in directories that are named like the tasks' data sets."""

import json
import random
from pathlib import Path
from typing import Any

NOUNS = ("moon", "tree", "fish", "stone", "river", "cat", "lamp", "road")


def task_data(directory: Path, documents: int = 12) -> Path:
    """boolq, gsm8k, hellaswag (with 2 training documents, fewer than its shots)."""
    rng = random.Random(0)

    def sentence() -> str:
        return f"The {rng.choice(NOUNS)} is near the {rng.choice(NOUNS)} and {rng.randrange(100)} more."

    def boolq(i: int) -> dict[str, Any]:
        return {"question": f"is the {rng.choice(NOUNS)} near", "passage": sentence(), "idx": i, "label": i % 2}

    def gsm8k(i: int) -> dict[str, Any]:
        return {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}

    def hellaswag(i: int) -> dict[str, Any]:
        return {"ind": i, "activity_label": "Walking", "ctx_a": sentence(), "ctx_b": "then", "ctx": sentence(),
                "endings": [sentence() for _ in range(4)], "label": str(i % 4), "source_id": str(i)}  # fmt: skip

    for name, config, rows, training, split in (
        ("aps/super_glue", "boolq", boolq, documents, "validation"),
        ("openai/gsm8k", "main", gsm8k, documents, "test"),
        ("Rowan/hellaswag", "default", hellaswag, 2, "validation"),
    ):
        folder = directory / name
        (folder / config).mkdir(parents=True)
        files = []
        for part, number in (("train", training), (split, documents)):
            lines = [json.dumps(rows(i)) for i in range(number)]
            (folder / config / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
            files.append(f"  - split: {part}\n    path: {config}/{part}.jsonl\n")
        header = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(files)}---\n"
        (folder / "README.md").write_text(header)
    return directory
