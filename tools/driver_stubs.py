"""Actors that stand in for generators and verifiers where the driver itself is measured: no model, no torch, the same
messages. A group takes a heavy-tailed time and comes with answers of the size that its request asks for."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from hapo_async.types import (
    Answer,
    Group,
    GroupHeader,
    GroupKey,
    GroupRequest,
    Judgement,
    Segment,
    Source,
    Verdict,
    Version,
    VersionSpan,
)


@dataclass(frozen=True)
class Announced:
    """An offer without tensors, for processes that have no torch."""

    version: Version
    transport: str = "ray"
    members: None = None

    def is_for(self, name: str) -> bool:
        return True


class StubGenerator:
    """Finishes each group after a lognormal time with mean ``mean_s``. A header's ``seconds`` is the moment it finished, by
    ``time.monotonic``, which all processes of a machine share."""

    def __init__(self, name: str, mean_s: float, sigma: float, seed: int) -> None:
        self.name, self.mean_s, self.sigma = name, mean_s, sigma
        self.version = Version(0, 0)
        self.tokens = 0
        self._rng = random.Random(seed)
        self._slots: dict[GroupKey, asyncio.Future[tuple[GroupHeader, Group]]] = {}

    async def ready(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "torch": "torch" in sys.modules}

    async def pace(self, mean_s: float) -> None:
        self.mean_s = mean_s

    async def submit(self, requests: list[GroupRequest]) -> None:
        loop = asyncio.get_running_loop()
        for request in requests:
            self._slots[request.key] = loop.create_future()
            seconds = self.mean_s * self._rng.lognormvariate(-(self.sigma**2) / 2, self.sigma)
            loop.call_later(seconds, self._finish, request, self.version)

    def _finish(self, request: GroupRequest, version: Version) -> None:
        future = self._slots.get(request.key)
        if future is None or future.done():
            return
        length = request.sampling.max_tokens
        segment = Segment(
            Source.POLICY,
            np.zeros(length, np.int32),
            np.zeros(length, np.float32),
            (VersionSpan(version, 0, length),),
        )
        answers = tuple(Answer(i, (segment,), "stop", "text") for i in range(request.sampling.n))
        self.tokens += length * len(answers)
        group = Group(request.key, request.prompt_tokens, answers, 1.0, self.name, os.getpid())
        future.set_result((GroupHeader.of(group, time.monotonic()), group))

    @ray.method(num_returns=2)
    async def collect(self, key: GroupKey) -> tuple[GroupHeader, Group]:
        key = GroupKey(*key)
        try:
            return await self._slots[key]
        finally:
            self._slots.pop(key, None)

    @ray.method(num_returns=2)
    async def sample(self, request: GroupRequest) -> tuple[GroupHeader, Group]:
        await self.submit([request])
        found: tuple[GroupHeader, Group] = await self.collect(request.key)
        return found

    async def install(self, offer: Announced) -> dict[str, Any]:
        self.version = offer.version
        return {"version": str(offer.version), "fetch_s": 0.0, "pause_s": 0.0, "bytes": 0}

    async def truncate(self, keys: list[GroupKey]) -> dict[GroupKey, tuple[int, ...]]:
        return {}

    async def abort(self, keys: list[GroupKey]) -> dict[GroupKey, tuple[int, ...]]:
        for key in keys:
            self._slots.pop(GroupKey(*key), None)
        return {}

    async def close(self) -> bool:
        """Whether torch was imported meanwhile."""
        return "torch" in sys.modules


class StubVerifier:
    """Judges at once: every second answer is right."""

    async def ready(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "torch": "torch" in sys.modules}

    async def judge(
        self, group: Group, prompt_text: str, truth: Any, verifier: str = "", extra: Mapping[str, Any] | None = None
    ) -> list[Judgement]:
        correct, wrong = Judgement(Verdict.CORRECT, 1.0), Judgement(Verdict.WRONG, 0.0)
        return [correct if answer.index % 2 else wrong for answer in group.answers]

    async def close(self) -> bool:
        return "torch" in sys.modules
