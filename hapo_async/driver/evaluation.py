"""Held-out evaluation on the same generators and verifiers that training uses.

``barrier``: the learner waits, every generator serves the learner's version, the answers carry no other. The cost is the
metric time/eval_s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.calls import CallFailed
from hapo_async import evaluate
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.errors import RunError
from hapo_async.types import GroupHeader, GroupKey, GroupRequest, Judgement, Prompt, Sampling

EVAL_TRIES = 3


@dataclass(frozen=True)
class Scored:
    """One evaluated prompt: headers and judgements of its answers; ``payload`` refers to the Group itself."""

    prompt: Prompt
    header: GroupHeader
    judgements: Sequence[Judgement]
    payload: Any

    @property
    def verdicts(self) -> list[bool | None]:
        """True, False, or None where the verifier failed."""
        return [None if j.reward is None else j.reward >= 1.0 for j in self.judgements]


class Evaluator:
    """Asks every prompt of every set; a prompt whose generator fails goes to another one, a bounded number of times."""

    def __init__(self, config: Config, sets: Mapping[str, Sequence[Prompt]], fleet: Fleet, judges: Judges) -> None:
        self.config = config
        self.sets = sets
        self.fleet = fleet
        self.judges = judges

    async def run(self, step: int) -> dict[str, float]:
        """Metrics of all sets at the version that is installed now."""
        metrics: dict[str, float] = {}
        for name, prompts in self.sets.items():
            scored = await self.score(name, prompts, step)
            metrics |= summarise(name, scored, self.config.eval.k)
        return metrics

    async def score(self, name: str, prompts: Sequence[Prompt], step: int) -> list[Scored]:
        """All prompts of one set, in their order. Raises RunError when one keeps failing."""
        plan: dict[str, list[tuple[int, GroupKey]]] = {}
        generators = self.fleet.alive
        for index, prompt in enumerate(prompts):
            generator = generators[index % len(generators)]
            # Evaluation keys live in negative epochs: they never meet a training key.
            plan.setdefault(generator.name, []).append((index, GroupKey(-1 - step, f"{name}/{prompt.uid}", 0)))
        results: dict[int, Scored] = {}
        await asyncio.gather(*(self._share(g, plan[g.name], prompts, results) for g in generators if g.name in plan))
        missing = [i for i in range(len(prompts)) if i not in results]
        for index in missing:
            results[index] = await self._again(name, prompts[index], step)
        return [results[i] for i in range(len(prompts))]

    async def _share(
        self, generator: Any, items: list[tuple[int, GroupKey]], prompts: Sequence[Prompt], results: dict[int, Scored]
    ) -> None:
        requests = [GroupRequest(key, prompts[i].tokens, self._sampling(prompts[i])) for i, key in items]
        width = self.config.generator.max_concurrent
        for start in range(0, len(requests), width):
            batch = requests[start : start + width]
            try:
                await self.fleet.submit(generator, batch)
                scored = await asyncio.gather(
                    *(self._one(generator, r.key, prompts[i]) for r, (i, _) in zip(batch, items[start:], strict=False))
                )
            except CallFailed as error:
                self.fleet.mark_failed(generator, error)
                return
            results.update({i: s for s, (i, _) in zip(scored, items[start:], strict=False)})

    async def _one(self, generator: Any, key: GroupKey, prompt: Prompt) -> Scored:
        header, payload = await self.fleet.collect(generator, key, self.config.generator.deadline_s)
        judgements = await self.judges.judge(payload, prompt, len(header.lengths))
        return Scored(prompt, header, judgements, payload)

    async def _again(self, name: str, prompt: Prompt, step: int) -> Scored:
        for attempt in range(1, EVAL_TRIES + 1):
            generator = self.fleet.alive[attempt % len(self.fleet.alive)]
            key = GroupKey(-1 - step, f"{name}/{prompt.uid}", attempt)
            try:
                await self.fleet.submit(generator, [GroupRequest(key, prompt.tokens, self._sampling(prompt))])
                return await self._one(generator, key, prompt)
            except CallFailed as error:
                self.fleet.mark_failed(generator, error)
        raise RunError(f"evaluation of prompt {prompt.uid!r} failed {EVAL_TRIES + 1} times")

    def _sampling(self, prompt: Prompt) -> Sampling:
        c = self.config
        return Sampling(
            n=c.eval.n,
            max_tokens=c.eval.max_tokens or c.sampling.max_tokens,
            temperature=c.eval.temperature,
            top_p=c.eval.top_p,
            seed=c.seed + 1,
        )


def summarise(name: str, scored: Sequence[Scored], k: int) -> dict[str, float]:
    """Accuracies, lengths and the version of one evaluated set."""
    metrics = evaluate.summarise(name, [s.verdicts for s in scored], k)
    prefix = f"eval/{evaluate.set_name(name)}"
    lengths = [n for s in scored for n in s.header.lengths]
    reasons = [r for s in scored for r in s.header.finish_reasons]
    if lengths:
        metrics[f"{prefix}/length_mean"] = sum(lengths) / len(lengths)
        metrics[f"{prefix}/truncated_frac"] = sum(r == "length" for r in reasons) / len(reasons)
        metrics[f"{prefix}/version"] = min(s.header.oldest.step for s in scored if s.header.oldest)
    return metrics
