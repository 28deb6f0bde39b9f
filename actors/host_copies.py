"""DeepSpeed's checkpoint engine, as copies in host memory: what a rank is told to save waits there for a thread to write it.

DeepSpeed calls ``save`` with objects that hold the very tensors that it trains. Import this module late: it imports DeepSpeed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from hapo_async.errors import RunError
from hapo_async.secrets import redacted

KNOWN = (LossScaler, ZeroStageEnum, fragment_address)
"""The classes besides tensors and plain data that DeepSpeed's files may hold; nothing else is ever unpickled."""


class HostCopies(CheckpointEngine):
    """Writes nothing: ``take`` hands the copies over, by the files that they belong into."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "HostCopies"
        self._files: dict[Path, Any] = {}

    def take(self) -> dict[Path, Any]:
        files, self._files = self._files, {}
        return files

    def create(self, info: CheckpointCommitInfo) -> None:
        self._files = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass  # the writer makes them

    def save(self, state_dict: Any, path: str) -> None:
        if isinstance(state_dict, dict) and "ds_config" in state_dict:  # whatever a user wrote into `deepspeed:`
            state_dict = state_dict | {"ds_config": redacted(state_dict["ds_config"])}
        self._files[Path(path)] = to_host(state_dict)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises RunError for a file that holds anything but tensors, plain data and classes of ``KNOWN``."""
        return load(path, map_location)

    def preserves_storage_sharing(self) -> bool:
        return False


def load(path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """What ``torch.save`` wrote, of ``KNOWN`` classes and plain data alone. Raises RunError for others."""
    with torch.serialization.safe_globals(list(KNOWN)):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            raise RunError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None


def check(path: Path) -> None:
    """Raises RunError for a file that would unpickle anything but tensors, plain data and classes of ``KNOWN``."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in KNOWN}
    try:
        others = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - names
    except Exception as error:
        raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if others:
        raise RunError(f"{path} holds {', '.join(sorted(others))}, which is not unpickled")


def to_host(item: Any, seen: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """``item`` with a copy in host memory of each tensor in it; tensors that are the same memory stay one. Whatever else it
    holds is copied too, so that nothing changes with what goes on being trained."""
    seen = {} if seen is None else seen
    if isinstance(item, torch.Tensor):
        return _copy(item, seen)
    if isinstance(item, dict):
        out: Any = type(item)((key, to_host(value, seen)) for key, value in item.items())
        if hasattr(item, "_metadata"):  # of a module's state_dict
            out._metadata = copy.deepcopy(item._metadata)
        return out
    if type(item) in (list, tuple, set):
        return type(item)(to_host(value, seen) for value in item)
    return copy.deepcopy(item)


def _copy(tensor: torch.Tensor, seen: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() and key in seen:
        return seen[key]
    copied = tensor.detach().to("cpu", copy=True)
    if tensor.numel():
        seen[key] = copied
    return copied
