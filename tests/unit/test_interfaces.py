"""What is relied on in vLLM is there, and what is not as expected is named."""

import ast
from pathlib import Path
from typing import Any

import pytest
import vllm

from vllm_mod import compat, interfaces
from vllm_mod.config import ConfigError
from vllm_mod.interfaces import INTERFACES, Interface, broken_interfaces, check_vllm

PACKAGE = Path(compat.__file__).parent


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda i: f"{i.module.split('.')[-1]}.{i.path}")
def test_the_installed_vllm_has_it(interface: Interface) -> None:
    assert interfaces._broken(interface) == ""


@pytest.mark.parametrize(
    ("interface", "phrase"),
    [
        (Interface("vllm.v1.core.nothing", "X"), "there is no vllm.v1.core.nothing"),
        (Interface("vllm.v1.core.block_pool", "BlockPool.lend"), "vllm.v1.core.block_pool has no BlockPool.lend"),
        (Interface("vllm.v1.core.block_pool", "BlockPool.touch", ("hand",)), "BlockPool.touch lacks hand"),
        (Interface("vllm.forward_context", "ForwardContext", ("attn_metadata", "mood")), "ForwardContext lacks mood"),
    ],
)
def test_what_has_changed_is_named(interface: Interface, phrase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "INTERFACES", (interface,))
    (found,) = broken_interfaces()
    assert phrase in found
    monkeypatch.setenv(interfaces.ALLOW_UNTESTED, "1")  # no way around: its tokens would be wrong
    with pytest.raises(ConfigError, match=r"has changed: .*; tested is"):
        check_vllm(experts=True)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1+cpu", "0.33.0rc1", "0.33.5"])
def test_tested_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(interfaces.ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(vllm, "__version__", version)
    check_vllm(experts=True)


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0"])
def test_other_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(interfaces.ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ConfigError, match=rf"tested with vLLM .*, and {version} is installed") as error:
        check_vllm(experts=True)
    assert "\n" not in str(error.value)
    monkeypatch.setenv(interfaces.ALLOW_UNTESTED, "1")
    check_vllm(experts=True)


def test_models_without_experts_do_not_import_moe_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(interfaces, "_broken", lambda i: asked.append(i.module) or "")
    broken_interfaces(experts=False)
    assert asked and not [module for module in asked if "fused_moe" in module]


def test_private_names_of_vllm_are_touched_in_one_place() -> None:
    """`compat` alone: elsewhere no attribute with a leading underscore is read of anything but ourselves."""
    allowed = {"self", "cls", "mine", "other"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("compat.py", "interfaces.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = node.value.id if isinstance(node.value, ast.Name) else ast.unparse(node.value)
                if owner not in allowed:
                    found.append(f"{path.name}: {owner}.{node.attr}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                found += [f"{path.name}: {node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
    assert not found
