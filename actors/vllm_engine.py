"""The vLLM engine (being written)."""
from __future__ import annotations
import importlib.util
from typing import Any


def is_installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return importlib.util.find_spec("vllm") is not None


def engine_args(config: Any) -> dict[str, Any]:
    return {}


async def start(*args: Any) -> Any:
    raise NotImplementedError
