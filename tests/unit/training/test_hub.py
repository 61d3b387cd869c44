"""What is fetched of a model on the hub: its own files and what the index names. The real client, and a small hub."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from router_tuning.hub import local_model
from vllm_mod.config import ConfigError

COMMIT = "c" * 40
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SMALL = ["config.json", "tokenizer.json", "additional_chat_templates/rag.jinja", "LICENSE", "README.md"]
OTHERS = [
    "params.json", "consolidated.safetensors", "original/consolidated.00.safetensors", "original/tokenizer.model",
    "tekken.json", "adapter_config.json", "adapter_model.safetensors", "model.gguf", "onnx/model.onnx", "modeling_x.py",
    "pytorch_model.bin", "model-00001-of-00001.safetensors", "trainer_log.json",
]  # fmt: skip
ADAPTER = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


class Hub(BaseHTTPRequestHandler):
    """One model, `org/model`: the requests of `snapshot_download`, and no more."""

    repository: Path

    def do_GET(self) -> None:
        path, headers = self.path.split("?")[0], {}
        files = {p.relative_to(self.repository).as_posix(): p for p in self.repository.rglob("*") if p.is_file()}
        if path.startswith("/api/models/org/model/tree/"):
            body = json.dumps(
                [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in files.items()]
            )
        elif path.startswith("/api/models/org/model"):
            body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            body = files[path.split("/", 5)[5]].read_text()
            headers = {"ETag": f'"{hashlib.sha1(body.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A directory that the hub offers as `org/model`."""
    from huggingface_hub import constants

    monkeypatch.setattr(Hub, "repository", tmp_path / "repository", raising=False)
    Hub.repository.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub.repository
    server.shutdown()
    server.server_close()


def offer(repository: Path, *names: str, weight_map: dict[str, str] | None = None) -> None:
    for name in names:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    if weight_map is not None:
        (repository / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def fetched(**options: bool) -> set[str]:
    directory = local_model("org/model", **options)
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_a_sharded_model(repository):
    shards = {"a": SHARDS[0], "b": SHARDS[1]}
    offer(repository, *SMALL, *SHARDS, *OTHERS, *ADAPTER, "model.safetensors", weight_map=shards)
    assert fetched() == {*SMALL, *SHARDS, INDEX}


def test_a_model_in_one_file(repository):
    offer(repository, *SMALL, *OTHERS, "model.safetensors")
    assert fetched() == {*SMALL, "model.safetensors"}


def test_mistrals_tokenizer_alone(repository):
    offer(repository, "config.json", "tekken.json", "model.safetensors")
    assert fetched() == {"config.json", "tekken.json", "model.safetensors"}


def test_routers_of_a_full_checkpoint_come_without_its_weights(repository):
    names = {"a": SHARDS[0], "b": SHARDS[1], "model.layers.1.router.weight": "routers.safetensors"}
    offer(repository, *SMALL, *SHARDS, *OTHERS, *ADAPTER, "routers.safetensors", "calibration.json", weight_map=names)
    records = {"calibration.json", "trainer_log.json"}
    assert fetched(routers=True) == {"config.json", INDEX, "routers.safetensors", *records, *ADAPTER}


@pytest.mark.parametrize("file", ["routers.safetensors", "model.safetensors"])
def test_routers_alone(repository, file):
    offer(repository, "mod_config.json", file, "README.md", "training.png")
    assert fetched(routers=True) == {"mod_config.json", file}


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_an_index_that_names_other_places(repository, name):
    offer(repository, "config.json", "sub/x.safetensors", weight_map={"a": name})
    for routers in (False, True):
        with pytest.raises(ConfigError, match=r"weight_map has .* only the plain name"):
            local_model("org/model", routers=routers)


def test_patterns_in_file_names_are_names(repository):
    offer(repository, "config.json", *SHARDS, weight_map={"a": "*.safetensors"})
    assert fetched() == {"config.json", INDEX}


def test_what_the_hub_lacks(repository):
    with pytest.raises(ConfigError, match=r"org/other: neither a local directory nor a model the hub gives: .*404"):
        local_model("org/other")
