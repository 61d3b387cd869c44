"""The house has no circle: who imports whom, read from the source."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"vllm_mod": ROOT / "vllm_mod", "router_tuning": ROOT / "training/router_tuning"}
#: Package -> what it may import of ours. `vllm_mod` comes first; benchmarks and the demo look at everything.
BELOW = {
    "vllm_mod": {"vllm_mod"},
    "vllm_mod.kv": {"vllm_mod"},
    "router_tuning": {"router_tuning", "vllm_mod"},
}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file."""
    root = PACKAGES[package]
    found = {}
    for path in root.rglob("*.py"):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def typing_only(tree: ast.Module) -> set[int]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    return {id(node) for block in blocks for node in ast.walk(block)}


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """Our modules that a module imports at run time, inside of functions, too."""
    tree = ast.parse(path.read_text())
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    skipped, found = typing_only(tree), set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            # `from . import card` names a module, `from .card import render` what is in it
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names}
    return {module for module in found if module in known} - {name}


def graph(package: str) -> dict[str, set[str]]:
    known = {name for each in PACKAGES for name in modules(each)}
    return {name: imported(name, path, known) for name, path in modules(package).items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(package):
    found = graph(package)
    assert sum(map(len, found.values())) > len(found)  # the imports were found
    try:
        list(TopologicalSorter(found).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_upwards(package):
    for name, others in graph(package).items():
        home = max((p for p in BELOW if name == p or name.startswith(p + ".")), key=len)
        wrong = {other for other in others if other.split(".")[0] not in BELOW[home]}
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_a_circle_would_be_found(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.py").write_text("def f():\n    from . import b\n")
    (tmp_path / "b.py").write_text("from .a import f\n")
    monkeypatch.setitem(PACKAGES, "ring", tmp_path)
    assert graph("ring") == {"ring": set(), "ring.a": {"ring.b"}, "ring.b": {"ring.a"}}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph("ring")).static_order())


@pytest.mark.parametrize("folder", ["vllm_mod", "training", "benchmarks", "demo", "tests", "requirements"])
def test_files_fit_in_a_head(folder):
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert lengths and not {name: length for name, length in lengths.items() if length > 350}
