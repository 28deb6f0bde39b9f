"""A version that is written into a model as it arrives, without a second copy: what is checked, and who may still write.

From the first write on the model is neither the old version nor the new one. Whoever owns it serves nothing until a
version was written whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from hapo_async.types import Version
from hapo_async.weights import Manifest, TransferError

Tensors = Sequence[tuple[str, torch.Tensor]]

Source = Callable[[Callable[[list[tuple[str, torch.Tensor]]], None]], Manifest]
"""Blocks while a version arrives: calls ``write(tensors)`` with each bucket's tensors, then returns the manifest. Raises
TransferError, also what ``write`` raised."""


class Cover:
    """Which parameters of a model have been given so far. A tied parameter may come under any of its names."""

    def __init__(self, model: Any) -> None:
        self._known = dict(model.named_parameters(remove_duplicate=False))
        self._given: set[str] = set()

    def add(self, tensors: Tensors) -> None:
        """Checks some tensors. Raises TransferError for unknown or repeated names and wrong shapes."""
        for name, tensor in tensors:
            if name not in self._known:
                raise TransferError(f"the model has no parameter {name!r}")
            expected = self._known[name].shape
            if expected != tensor.shape:
                raise TransferError(f"parameter {name!r} has shape {tuple(expected)}; {tuple(tensor.shape)} arrived")
            if name in self._given:
                raise TransferError(f"parameter {name!r} came twice")
            self._given.add(name)

    def check_complete(self) -> None:
        """Raises TransferError when a parameter was never given."""
        given = {id(self._known[name]) for name in self._given}
        missing = [name for name, parameter in self._known.items() if id(parameter) not in given]
        if missing:
            raise TransferError(f"{len(missing)} parameters never arrived: {', '.join(missing[:5])}")


async def pour(version: Version, source: Source, model: Any, write: Callable[[Tensors], Awaitable[None]]) -> Manifest:
    """Runs ``source`` in a thread and hands each of its buckets, checked against ``model``, to ``write`` in this event loop.

    Returns once every parameter was written. Raises what ``source`` and ``write`` raise, and TransferError for another
    version or missing parameters; nothing is written after that, even if ``source`` still runs.
    """
    loop, cover, is_open = asyncio.get_running_loop(), Cover(model), True

    async def forward(tensors: Tensors) -> None:
        if not is_open:
            raise TransferError(f"version {version} was given up")
        await write(tensors)

    def checked(tensors: list[tuple[str, torch.Tensor]]) -> None:
        cover.add(tensors)
        asyncio.run_coroutine_threadsafe(forward(tensors), loop).result()

    try:
        manifest = await asyncio.to_thread(source, checked)
    finally:
        is_open = False
    if (manifest.version, manifest.kind) != (version, "full"):
        raise TransferError(f"full {version} was expected; {manifest.kind} {manifest.version} arrived")
    cover.check_complete()
    return manifest
