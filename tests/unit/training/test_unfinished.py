"""A command that was interrupted while it made patches: what it goes on from, and that the result is the same."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from router_tuning import card, distill, export, fit_command, kept_file, patch_command, patches, unfinished
from router_tuning.cli import main
from tests.support.models import routed_checkpoint
from tests.unit.training.test_fit_command import ROWS, base, data, words

__all__ = ["base", "data"]  # fixtures
BOTH = ("--layers", "0-3", "--target-capacity", "0.4", "--distilled-passes", "3")
MORE = (*BOTH, "--compare-static", "false")
#: Nine tenths of the samples, four at once, three times.
STEPS = 3 * -(-(len(ROWS) - len(ROWS[::10])) // 4)


def routers(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "routers.safetensors")


def same(one: Path, other: Path) -> bool:
    found = routers(one), routers(other)
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "c"
    assert main(words(base, data, output, *MORE)) == 0
    return output


def calls(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, stop_at: int | None = None) -> list[Any]:
    """Notes each call; Ctrl-C comes with call `stop_at`."""
    found: list[Any] = []
    inner = getattr(where, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        if len(found) == stop_at:
            raise KeyboardInterrupt
        found.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(where, name, noted)
    return found


@pytest.mark.parametrize(
    ("where", "name", "stop_at", "said"),
    [
        (patches, "_moments", 6, "2 patches are in"),  # four are of the measurement
        (distill._Dense, "note", 3, "4 patches are in"),
        (distill._Steps, "clear", 0, "4 patches are in"),
        (distill._Steps, "clear", 7, "4 patches and 7 steps of their distillation are in"),
        (distill._Steps, "take", 7, "4 patches and 7 steps of their distillation are in"),
        (distill, "_go", 2, f"4 patches and {STEPS} steps of their distillation are in"),
        (fit_command, "write_checkpoint", 0, f"4 patches and {STEPS} steps of their distillation are in"),
    ],
)
def test_it_goes_on(
    base: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], where: Any, name: str, stop_at: int, said: str,
) -> None:  # fmt: skip
    command, file = words(base, data, tmp_path / "c", *MORE), tmp_path / "c.unfinished"
    with monkeypatch.context() as patch:
        calls(patch, where, name, stop_at)
        assert main(command) == 130
    assert f"{said} {file}; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "c").exists() and file.is_file()
    again = [calls(monkeypatch, *what) for what in ((fit_command, "best"), (patches, "_moments"))]
    steps = calls(monkeypatch, distill._Steps, "take")
    assert main(command) == 0
    assert [len(found) for found in again] == [0, 2 if name == "_moments" else 0]
    assert len(steps) == STEPS - (int(said.split()[3]) if "steps" in said else 0)
    assert same(tmp_path / "c", whole) and [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("where", "name", "stop_at", "left"),
    [
        (patches, "_moments", 6, (2, 4, 2 * STEPS)),  # four are of the measurement
        (distill._Steps, "take", STEPS - 1, (0, 4, STEPS + 1)),
        (patches, "_moments", 10, (0, 2, STEPS)),
        (distill._Steps, "take", STEPS + 3, (0, 0, STEPS - 3)),
        (fit_command, "write_checkpoint", 0, (0, 0, 0)),
    ],
)
def test_it_goes_on_with_the_static_drop_that_it_compares(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    where: Any, name: str, stop_at: int, left: tuple[int, int, int],
) -> None:  # fmt: skip
    """left: patches of the routers, of the drop, and steps of both, that the second run makes."""
    assert main(words(base, data, tmp_path / "whole", *BOTH)) == 0
    command = words(base, data, tmp_path / "c", *BOTH)
    command[command.index("--output") + 1] += "/"  # as a shell completes it
    with monkeypatch.context() as patch:
        calls(patch, where, name, stop_at)
        assert main(command) == 130
    both = left[1] < 4 or left[2] < STEPS
    assert (tmp_path / "c.static.unfinished").is_file() == both
    assert ("c.static.unfinished; the same command" in capsys.readouterr().err) == both
    again = calls(monkeypatch, patches, "_moments"), calls(monkeypatch, distill._Steps, "take")
    assert main(command) == 0
    assert [len(found) for found in again] == [left[0] + left[1], left[2]]
    assert same(tmp_path / "c", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "whole"]


def test_one_of_other_flags_is_begun_anew(
    base: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls(patch, distill._Steps, "take", 3)
        assert main(words(base, data, tmp_path / "c", *MORE, "--static")) == 130
    assert main(words(base, data, tmp_path / "c", *MORE)) == 0
    assert same(tmp_path / "c", whole)


def test_one_that_cannot_be_read_is_begun_anew(
    base: Path, data: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.unfinished").write_bytes(b"PK\x03\x04 half of it")
    assert main(words(base, data, tmp_path / "c", *MORE)) == 0
    assert "c.unfinished cannot be read, and is begun anew" in caplog.text
    assert same(tmp_path / "c", whole) and not (tmp_path / "c.unfinished").exists()


def test_it_lies_beside_an_output_in_a_new_directory(
    base: Path,
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(base, data, tmp_path / "new/deep/c", *MORE, "--costs", str(tmp_path / "costs.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(command) == 2
    assert "c.unfinished: cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    assert main(command) == 0
    assert same(tmp_path / "new/deep/c", whole) and [path.name for path in (tmp_path / "new/deep").iterdir()] == ["c"]


def test_a_killed_one_loses_half_a_minute(
    base: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_file, "AT_RISK", 0.0)
    monkeypatch.setattr(unfinished.Unfinished, "named_on_interrupt", lambda _: nullcontext())  # nothing is written then
    with monkeypatch.context() as patch:
        calls(patch, distill._Steps, "take", 5)
        assert main(words(base, data, tmp_path / "c", *MORE)) == 130
    again = calls(monkeypatch, distill._Steps, "take")
    assert main(words(base, data, tmp_path / "c", *MORE)) == 0
    assert len(again) == STEPS - 5 and same(tmp_path / "c", whole)


@pytest.fixture(scope="module")
def routed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed_checkpoint(base, tmp_path_factory.mktemp("routed") / "c", "attn_sequence", (0, 1, 3), seed=3)


@pytest.fixture(params=["in place", "another", "export"])
def others(request: pytest.FixtureRequest, base: Path, data: Path, routed: Path, tmp_path: Path) -> Any:
    """The other commands that make patches: what is typed, the file that is kept, its output, what writes it."""
    output, sort = tmp_path / "c", request.param
    more = ["--data", str(data), "--output", str(output), "--eval-fraction", "0"]
    if sort == "export":
        words = ["export", "--model", str(base), "--drop-attention", "3", "--patch-rank", "2", *more]
        return words, tmp_path / "c.unfinished", output, (export, "write_checkpoint")
    if sort == "another":
        words = ["patch", str(routed), "--rank", "2", *more]
        return words, tmp_path / "c.unfinished", output, (patch_command, "replace_routers")
    routed_checkpoint(base, output, "attn_sequence", (0, 1, 3), seed=3)
    words = ["patch", str(output), "--rank", "2", "--data", str(data), "--eval-fraction", "0"]
    return words, output / "patches.unfinished", output, (patch_command, "replace_routers")


@pytest.mark.parametrize("where", ["patches", "steps", "writing"])
def test_so_do_the_others(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    command, file, output, writes = others
    stops = {"patches": (patches, "_moments", 2), "steps": (distill._Steps, "take", 7), "writing": (*writes, 0)}
    with monkeypatch.context() as patch:
        calls(patch, *stops[where])
        assert main(command) == 130
    said = {"patches": "2 patches are in", "steps": "3 patches and 7 steps", "writing": "3 patches and "}[where]
    if (where, writes[0]) != ("writing", export):  # that one has left the work behind, and its file is whole
        assert said in capsys.readouterr().err
    assert file.is_file()
    with monkeypatch.context() as patch:
        again = calls(patch, patches, "_moments"), calls(patch, distill._Steps, "take")
        assert main(command) == 0
    steps = 2 * -(-(len(ROWS) - len(ROWS[::10])) // 4)
    assert [len(found) for found in again] == {"patches": [1, steps], "steps": [0, steps - 7], "writing": [0, 0]}[where]
    assert [path.name for path in tmp_path.iterdir()] == ["c"] and not file.exists()
    resumed = routers(output)
    if command[0] == "patch" and "--output" not in command:
        assert main(command) == 0  # what is there is replaced
    else:
        output.rename(tmp_path / "resumed")
        assert main(command) == 0
    anew = routers(output)
    assert all(torch.equal(resumed[name], anew[name]) for name in anew) and resumed.keys() == anew.keys()


def test_what_another_routing_left_behind_is_not_gone_on_from(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", (0, 1, 3), seed=3)
    command = ["patch", str(checkpoint), "--rank", "2", "--data", str(data)]
    with monkeypatch.context() as patch:
        calls(patch, distill._Steps, "take", 7)
        assert main(command) == 130
    assert main(["calibrate", str(checkpoint), "--target-capacity", "0.3", "--data", str(data)]) == 0
    again = calls(monkeypatch, patches, "_moments")
    assert main(command) == 0 and len(again) == 3


def test_nor_what_another_version_left(
    base: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "__version__", "0.1")
        calls(patch, distill._Steps, "take", 3)
        assert main(words(base, data, tmp_path / "c", *MORE)) == 130
    steps = calls(monkeypatch, distill._Steps, "take")
    assert main(words(base, data, tmp_path / "c", *MORE)) == 0
    assert len(steps) == STEPS and same(tmp_path / "c", whole)


@pytest.mark.parametrize("sort", ["fit", "patch", "in place", "export"])
def test_an_interrupt_that_waits_for_the_output_leaves_nothing(
    base: Path, data: Path, routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The output is there, so there is nothing to go on with."""
    inner, output = card.write, tmp_path / "c"
    more = ["--data", str(data), "--eval-fraction", "0"]
    if sort == "in place":
        routed_checkpoint(base, output, "attn_sequence", (0, 1, 3), seed=3)
    command = {
        "fit": words(base, data, output, *MORE),
        "patch": ["patch", str(routed), "--rank", "2", *more, "--output", str(output)],
        "in place": ["patch", str(output), "--rank", "2", *more],
        "export": ["export", "--model", str(base), "--drop-attention", "3", "--patch-rank", "2", *more,
                   "--output", str(output)],
    }[sort]  # fmt: skip

    def pressed(directory: Path) -> None:
        inner(directory)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(card, "write", pressed)
    assert main(command) == 130
    assert "goes on from it" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c"] and not list(output.glob("*unfinished*"))
    assert (output / "patches.json").is_file()
