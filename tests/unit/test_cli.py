"""`vllm-mod inspect`: the table, the JSON object, and one-line errors with exit status 2."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file

from vllm_mod.checkpoint import ROUTERS_FILE, router_name, write_checkpoint, write_routers
from vllm_mod.cli import main
from vllm_mod.config import ModConfig
from vllm_mod.tensors import Patch

CONFIG = ModConfig.parse(
    {
        "version": 1,
        "granularity": "attn_sequence",
        "layers": [2, 4],
        "threshold": [0.5, 0.25],
        "target_capacity": 0.5,
        "base_model": "meta-llama/Llama",
    },
    "test",
)
ROUTERS = {2: torch.full((1, 8), 0.5), 4: torch.zeros(1, 8, dtype=torch.bfloat16)}


@pytest.fixture
def full(bare_base, tmp_path):
    return write_checkpoint(bare_base, tmp_path / "full", CONFIG, ROUTERS)


def inspect(capsys, *args):
    status = main(["inspect", *map(str, args)])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


def test_table_of_a_full_checkpoint(capsys, full):
    lines = [line.split() for line in inspect(capsys, full).splitlines()]
    for fact in [
        ["architecture", "LlamaMoDForCausalLM"],
        ["base", "model", "meta-llama/Llama"],
        ["routed", "layers", "2", "of", "6"],
        ["target", "capacity", "0.5"],
        ["layer", "routed", "threshold", "router", "norm", "shape", "dtype"],
        ["0", "no"],
        ["2", "yes", "0.5", "1.414", "[1,", "8]", "float32"],
        ["4", "yes", "0.25", "0", "[1,", "8]", "bfloat16"],
        ["5", "no"],
    ]:
        assert fact in lines
    assert "attn_sequence (self-attention, decided once per request)" in inspect(capsys, full)


def test_json_of_a_full_checkpoint(capsys, full):
    report = json.loads(inspect(capsys, full, "--json"))
    layers = report.pop("layers")
    (note,) = report.pop("notes")
    assert "AutoModelForCausalLM" in note and "dense base model" in note and f"load_reference('{full}')" in note
    assert report == {
        "path": str(full),
        "kind": "full checkpoint",
        "architecture": "LlamaMoDForCausalLM",
        "num_layers": 6,
        "hidden_size": 8,
        "base_model": "meta-llama/Llama",
        "version": 1,
        "granularity": "attn_sequence",
        "window": None,
        "patch": None,
        "target_capacity": 0.5,
    }
    assert [row["layer"] for row in layers if row["routed"]] == [2, 4]
    assert [row["layer"] for row in layers if not row["routed"]] == [0, 1, 3, 5]
    norm = pytest.approx(2**0.5)
    expected = {"threshold": 0.5, "router_norm": norm, "shape": [1, 8], "dtype": "float32"}
    assert layers[2] == {"layer": 2, "routed": True} | expected


def test_router_only_directory(capsys, tmp_path):
    out = write_routers(tmp_path / "routers", CONFIG, ROUTERS)
    report = json.loads(inspect(capsys, out, "--json"))
    assert (report["kind"], report["architecture"], report["num_layers"]) == ("router-only", None, None)
    assert (report["hidden_size"], [row["layer"] for row in report["layers"]]) == (8, [2, 4])
    assert "routed layers    2\n" in inspect(capsys, out)


def test_files_beside_it_are_named_with_the_way_out(capsys, full):
    (full / "adapter_config.json").write_text("{}")
    (full / "tekken.json").write_text("{}")
    table, notes = inspect(capsys, full), json.loads(inspect(capsys, full, "--json"))["notes"]
    assert [line.removeprefix("note: ") for line in table.splitlines() if line.startswith("note: ")] == notes
    assert notes[0] == f"{full}/adapter_config.json: transformers would attach this adapter, vLLM would not; remove it"
    assert notes[1].startswith(f"{full}/tekken.json: transformers would take it for the tokenizer")
    (full / "original").mkdir()
    (full / "original/consolidated.00.safetensors").write_bytes(b"")
    assert main(["inspect", str(full)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "original/consolidated.00.safetensors: vLLM would read this file" in line and "remove it" in line


def test_a_path_that_a_shell_would_read_is_not_put_into_a_command(capsys, full, tmp_path):
    odd = tmp_path / "it's $HOME"
    full.rename(odd)
    assert "load_reference('CKPT')" in inspect(capsys, odd)


def test_router_only_directory_with_the_bases_config(capsys, bare_base, tmp_path):
    out = write_routers(tmp_path / "routers", CONFIG, ROUTERS)
    (out / "config.json").write_bytes((bare_base / "config.json").read_bytes())
    report = json.loads(inspect(capsys, out, "--json"))
    assert (report["kind"], report["architecture"], report["notes"]) == ("router-only", None, [])


def test_reference_routers(capsys, tmp_path):
    save_file({router_name(i): w for i, w in ROUTERS.items()}, tmp_path / "model.safetensors")
    (tmp_path / "mod_config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert [row["threshold"] for row in json.loads(inspect(capsys, tmp_path, "--json"))["layers"]] == [0.5, 0.25]


def test_static_checkpoint(capsys, bare_base, tmp_path):
    config = ModConfig(version=1, granularity="block_static", layers=(1, 2))
    out = write_checkpoint(bare_base, tmp_path / "out", config, {})
    assert inspect(capsys, out).count("always skipped") == 3  # in words, and two layers
    assert json.loads(inspect(capsys, out, "--json"))["layers"][1] == {"layer": 1, "routed": True, "threshold": None}


VERSION_2 = {"version": 2, "window": 16, "cutoff": [-40.5, 3], "patch": {"rank": 2}}


def test_window_cutoffs_and_patches(capsys, bare_base, tmp_path):
    config = ModConfig.parse({k: v for k, v in CONFIG.to_dict().items() if k != "threshold"} | VERSION_2, "test")
    patch = Patch(torch.full((8,), 0.5), torch.eye(2, 8), 2 * torch.eye(8, 2))
    patches = {2: patch, 4: Patch(torch.zeros(8), torch.eye(2, 8), torch.zeros(8, 2))}
    full = write_checkpoint(bare_base, tmp_path / "full", config, ROUTERS, patches=patches)
    alone = write_routers(tmp_path / "routers", config, ROUTERS, patches)
    for directory in (full, alone):
        report = json.loads(inspect(capsys, directory, "--json"))
        assert (report["version"], report["window"], report["patch"]) == (2, 16, {"rank": 2})
        first, second = (row for row in report["layers"] if row["routed"])
        assert (first["cutoff"], second["cutoff"]) == (-40.5, 3) and "threshold" not in first
        assert first["patch_bias_norm"] == pytest.approx(2**0.5)
        assert first["patch_map_norm"] == pytest.approx(torch.linalg.norm(patch.up @ patch.down).item())
        assert (second["patch_bias_norm"], second["patch_map_norm"], second["router_norm"]) == (0, 0, 0)
        text = inspect(capsys, directory)
        assert "decided once per request by its first 16 prompt tokens, which always run" in text
        assert "patch            rank 2, in place of what is skipped" in text
        header, row = (next(x for x in text.splitlines() if x.startswith(start)) for start in ("layer", "2 "))
        assert " ".join(header.split()) == "layer routed cutoff router norm shape dtype patch bias norm patch map norm"
        assert row.split() == ["2", "yes", "-40.5", "1.414", "[1,", "8]", "float32", "1.414", "2.828"]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_static_checkpoint_may_have_patches(capsys, bare_base, tmp_path, rank):
    config = ModConfig(version=2, granularity="attn_static", layers=(1,), patch={"rank": rank})
    patches = {1: Patch(torch.ones(8), *((torch.ones(3, 8), torch.ones(8, 3)) if rank else ()))}
    full = write_checkpoint(bare_base, tmp_path / "full", config, {}, patches=patches)
    alone = write_routers(tmp_path / "routers", config, {}, patches)
    for directory in (full, alone):
        report = json.loads(inspect(capsys, directory, "--json"))
        assert (report["hidden_size"], report["patch"]) == (8, {"rank": rank})
        (row,) = (row for row in report["layers"] if row["routed"])
        assert row["threshold"] is None and row["patch_map_norm"] == pytest.approx(24.0 if rank else 0.0)
        assert "1      always skipped" in inspect(capsys, directory)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_errors_are_one_line_and_status_2(capsys, full, bare_base, tmp_path, flags):
    (full / ROUTERS_FILE).write_bytes(b"")
    misfit = write_routers(tmp_path / "misfit", CONFIG, {2: torch.zeros(1, 8), 4: torch.zeros(1, 9)})
    for path, said in [
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (bare_base, "key 'mod_config' is missing"),
        (full, f"{ROUTERS_FILE}: not a readable safetensors file"),
        (misfit, "model.layers.4.router.weight has shape [1, 9]"),
    ]:
        assert main(["inspect", str(path), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("vllm-mod: error: ")
        assert err.count("\n") == 1
        assert said in err


def test_installed_command_without_vllm(full, tmp_path):
    """The console script of this environment answers, and loads neither vLLM nor transformers."""
    (tmp_path / "vllm.py").write_text("raise RuntimeError('vLLM was imported')")
    (tmp_path / "transformers.py").write_text("raise RuntimeError('transformers was imported')")
    code = "from vllm_mod.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "inspect", str(full), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["granularity"] == "attn_sequence"


def test_help_and_version(capsys):
    for argv, said in [
        (["--help"], "vllm serve"),
        (["inspect", "--help"], "router-only directory"),
        (["--version"], version("vllm-mod")),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert said in capsys.readouterr().out
