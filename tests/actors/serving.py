"""Generators that several tests share: one actor per engine, started once and at the same time, and what is asked of them.

The model is random with large weights: answers are long, their ends are random, and two versions differ clearly.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actors  # noqa: F401 (keeps a Ray of our own on loopback, when it comes before the first import of ray)
from actors.transports import Offer
from hapo_async import weights
from hapo_async.config import parse
from hapo_async.types import Answer, Group, GroupKey, GroupRequest, Sampling, Version
from tools.weight_faults import FaultyGenerator

DEADLINE_S = 60
READY_S = 400
LONGEST = 300
KINDS = {"vllm": ("vllm", 1), "vllm of two ranks": ("vllm", 2), "transformers": ("transformers", 1)}
"""engine and tensor_parallel by name."""


def random_model(chain_model: str, seed: int):
    config = AutoModelForCausalLM.from_pretrained(chain_model).config
    config.initializer_range = 0.1
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Probe(FaultyGenerator):
    """A generator whose transfers can be armed, and whose engine can be asked for what no driver asks: writing in place, also
    half of a version, and ending groups while they are being submitted."""

    async def pour(self, version: Version, pieces: list[tuple[weights.Bucket, np.ndarray]], fails: bool) -> float:
        """Installs in place what ``pieces`` hold. fails: the line goes dead after them."""

        def source(write: Any) -> weights.Manifest:
            for bucket, data in pieces:
                write(list(weights.unpack(bucket, data)))
            if fails:
                raise weights.TransferError("the line went dead")
            return weights.Manifest(version, tuple(bucket for bucket, _ in pieces))

        return await self.engine.install_in_place(version, source)

    async def race(self, requests: list[GroupRequest], how: str, pauses: int) -> list[Any]:
        """Ends groups (how: abort | hand_over | truncate) when their submission was given ``pauses`` turns of the event loop.
        Returns what that call returned."""
        submission = asyncio.create_task(self.engine.submit(requests))
        for _ in range(pauses):
            await asyncio.sleep(0)
        found: Any = await getattr(self.engine, how)([r.key for r in requests])
        await submission
        return list(found)


class Generators:
    """By kind: actors that start together, and what they serve."""

    def __init__(self, ray: Any, chain_model: str, folder: Path) -> None:
        random_model(chain_model, 0).save_pretrained(folder)
        AutoTokenizer.from_pretrained(chain_model).save_pretrained(folder)
        self._ray, self._chain, self._folder = ray, chain_model, folder
        self._started = {kind: self._start(kind) for kind in KINDS}
        self._served: dict[str, SimpleNamespace] = {}

    def _start(self, kind: str) -> tuple[Any, Any]:
        engine, ranks = KINDS[kind]
        settings = {
            "generator": {"engine": engine, "tensor_parallel": ranks},
            "sampling": {"max_tokens": LONGEST},
            "data": {"max_prompt_tokens": 100},
            "learner": {"lora": {"rank": 4, "alpha": 6.0}},
        }
        arguments = (f"generator-{kind}", str(self._folder), parse(settings).model_dump(mode="json"), {"device": "cpu"})
        actor = self._ray.remote(Probe).options(num_cpus=0.5, max_concurrency=1000).remote(*arguments)
        return actor, actor.ready.remote()

    def served(self, kind: str) -> SimpleNamespace:
        """A started generator: engine, actor, ray, pid, engine_pids, and ``models``: the weights of each version installed."""
        if kind not in self._started:
            self._started[kind] = self._start(kind)
        if kind not in self._served:
            actor, ready = self._started[kind]
            told = self._ray.get(ready, timeout=READY_S)
            self._served[kind] = SimpleNamespace(
                engine=told["engine"],
                actor=actor,
                ray=self._ray,
                pid=told["pid"],
                engine_pids=told["engine_pids"],
                models={Version(0, 0): random_model(self._chain, 0)},
                chain=self._chain,
            )
        return self._served[kind]

    def gone(self, kind: str) -> None:
        """The test has ended it; the next that asks gets a new one."""
        del self._served[kind], self._started[kind]

    def close(self) -> None:
        for actor, _ in self._started.values():
            self._ray.kill(actor)


def get(served, ref):
    return served.ray.get(ref, timeout=DEADLINE_S)


def requests(name: str, groups: int, prefixes: tuple[Answer, ...] = (), **sampling) -> list[GroupRequest]:
    rng = np.random.default_rng(len(name))
    return [
        GroupRequest(
            GroupKey(0, f"{name}-{i}", 0),
            rng.integers(2, 100, 5 + 3 * i).astype(np.int32),
            Sampling(**{"n": 4, "max_tokens": LONGEST - 100, **sampling}),
            prefixes,
        )
        for i in range(groups)
    ]


def collect(served, asked: list[GroupRequest]) -> list[Group]:
    refs = [served.actor.collect.remote(r.key) for r in asked]
    headers, groups = get(served, [h for h, _ in refs]), get(served, [g for _, g in refs])
    for header, group in zip(headers, groups, strict=True):
        assert header.key == group.key
        assert header.lengths == tuple(a.length for a in group.answers)
        assert header.finish_reasons == tuple(a.finish_reason for a in group.answers)
    return groups


def stream(model, version: Version) -> tuple[weights.Manifest, list[np.ndarray]]:
    pieces = list(weights.pack(model.named_parameters(), 100_000))
    assert len(pieces) > 2
    return weights.Manifest(version, tuple(b for b, _ in pieces)), [d for _, d in pieces]


def offer(served, manifest: weights.Manifest, data: list[np.ndarray]) -> Offer:
    refs = [served.ray.put(d) for d in data]
    return Offer("ray", manifest.version, manifest.kind, None, manifest, {"refs": refs})


def install(served, step: int) -> dict:
    model = random_model(served.chain, step)
    manifest, data = stream(model, Version(1, step))
    report = get(served, served.actor.install.remote(offer(served, manifest, data)))
    served.models[manifest.version] = model
    return report


def stats(served) -> dict:
    return get(served, served.actor.stats.remote())


def wait_for_tokens(served, more: int = 1) -> None:
    """Until some answers moved on."""
    goal, end = stats(served)["tokens"] + more, time.monotonic() + DEADLINE_S
    while stats(served)["tokens"] < goal:
        assert time.monotonic() < end


@torch.no_grad()
def logp(model, prompt: np.ndarray, answer: Answer) -> np.ndarray:
    """float64 [T]: log-probs of one answer, from one plain forward without a cache."""
    ids = torch.from_numpy(np.concatenate([prompt, answer.tokens]).astype(np.int64))[None]
    logp = torch.log_softmax(model(ids).logits[0].double(), -1)
    return logp[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def errors(served, groups: list[Group]) -> float:
    """Largest error of a recorded log-prob against the model of that token's version."""
    worst = 0.0
    for group in groups:
        for answer in group.answers:
            for span in answer.spans:
                cut = slice(span.start, span.end)
                expected = logp(served.models[span.version], group.prompt_tokens, answer)[cut]
                worst = max(worst, np.abs(expected - answer.logp_behave[cut]).max())
    return worst
