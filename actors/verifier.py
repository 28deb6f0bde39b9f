"""Where verifiers run: a Ray actor that holds the worker processes of ``hapo_async.verify.pool``.

The actor waits; the workers work. They die with it, however it ends. One pool per verifier name, started on first use.

| method | consumes | waits for | unblocked by |
|---|---|---|---|
| ``judge`` | one group | its answers' judgements | the pool: a try takes at most ``timeout_s`` in its worker |
| ``stats`` | nothing | nothing: it is answered while others judge | |
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray

from hapo_async.types import Group, Judgement
from hapo_async.verify.pool import VerifierPool


@ray.remote(num_cpus=0)
class VerifierActor:
    """Judges groups. name: the default verifier; workers: processes per verifier name; timeout_s: per judgement."""

    def __init__(self, name: str, workers: int, timeout_s: float) -> None:
        self._name, self._workers, self._timeout_s = name, workers, timeout_s
        self._pools: dict[str, VerifierPool] = {}
        self._waiting = 0

    async def ready(self) -> dict[str, Any]:
        """Starts the default verifier's workers. Raises ConfigError when a plug-in cannot be loaded in them."""
        await self._pool(self._name).start_async()
        return {"pid": os.getpid(), "workers": self._workers}

    async def judge(
        self,
        group: Group,
        prompt_text: str,
        truth: Any,
        verifier: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> list[Judgement]:
        """One judgement per answer, in order. ``group`` is passed as an object reference and resolved by Ray."""
        items = [(prompt_text, answer.text, truth, extra or {}) for answer in group.answers]
        self._waiting += len(items)
        try:
            return await self._pool(verifier or self._name).judge_async(items)
        finally:
            self._waiting -= len(items)

    async def stats(self) -> dict[str, Any]:
        """Answered while others are judged: judgements and verdicts over all pools, those charged to answers and those masked,
        answers of groups that wait for theirs, the slowest pool's median and 99th percentile [s], worker pids."""
        each = [pool.stats() for pool in self._pools.values()]
        verdicts: Counter[str] = Counter()
        for stats in each:
            verdicts.update(stats["verdicts"])
        return {
            "pid": os.getpid(),
            "judged": sum(verdicts.values()),
            "waiting": self._waiting,
            "verdicts": dict(verdicts),
            "charged": sum(s["charged"] for s in each),
            "masked": sum(s["masked"] for s in each),
            "p50_s": max((s["p50_s"] for s in each), default=0.0),
            "p99_s": max((s["p99_s"] for s in each), default=0.0),
            "workers_started": sum(s["workers_started"] for s in each),
            "worker_pids": [pid for s in each for pid in s["worker_pids"]],
        }

    async def close(self) -> None:
        """Ends the workers; what is still being judged fails."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _pool(self, name: str) -> VerifierPool:
        if name not in self._pools:
            self._pools[name] = VerifierPool(name, self._workers, self._timeout_s)
        return self._pools[name]
