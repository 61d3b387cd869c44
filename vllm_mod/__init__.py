"""Dynamic-depth (Router-Tuning) models for vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-mod")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0"


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every vLLM process, may run twice, imports no CUDA."""
    from .plugin import register_models

    register_models()
