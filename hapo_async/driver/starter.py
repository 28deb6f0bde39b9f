"""Where generators start: a place of its own for each, and an actor in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from actors import placement
from actors.generator import GeneratorActor
from hapo_async.config import Config

ACTOR_OPTIONS: dict[str, Any] = {"max_concurrency": 1000, "max_restarts": 0, "enable_task_events": False}
"""Of actors that are called several times for each group. Events of every call would cost a tenth of the driver's time."""


class Starter:
    """What a run's generators have in common: config, model, cluster, CPUs of each rank."""

    def __init__(self, config: Config, model_path: str, cluster: placement.Cluster, cpu_share: float) -> None:
        self._config, self._model_path, self._cluster, self._cpu_share = config, model_path, cluster, cpu_share

    def first(self, slots: Sequence[placement.Slot] = ()) -> list[tuple[str, Any, placement.Slot]]:
        """(name, actor, slot) of those that a run starts with, in ``slots`` or in places of their own. Raises RunError."""
        out = []
        for index in range(self._config.generator.count):
            name, width = f"generator-{index}", self._config.generator.width
            slot = (
                slots[index] if slots else placement.reserve(self._cluster, width, self._cpu_share, name, one_node=True)
            )
            out.append((name, self.spawn(name, slot), slot))
        return out

    async def place(self, name: str, timeout_s: float) -> placement.Slot:
        """A place for one more. Raises RunError when the cluster does not give one in time."""
        width = self._config.generator.width
        return await placement.reserve_beside(self._cluster, width, self._cpu_share, name, timeout_s)

    def is_whole(self, slot: placement.Slot) -> bool:
        """Whether a generator can be started in a slot again."""
        return placement.is_whole(slot)

    def spawn(self, name: str, slot: placement.Slot) -> Any:
        """The actor; ``ready()`` tells when it can be used."""
        options = slot.options(0, gpus=0 if self._config.generator.width > 1 else None, **ACTOR_OPTIONS)
        actor = ray.remote(GeneratorActor).options(**options)
        return actor.remote(
            name, self._model_path, self._config.model_dump(mode="json"), {"device": self._cluster.device}
        )
