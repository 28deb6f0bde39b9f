"""Held-out evaluation on the same generators and verifiers that training uses.

``barrier``: the learner waits, every generator serves the learner's version, the answers carry no other. The cost is the
metric time/eval_s. ``detached`` and ``floating`` run beside training: see ``crew`` for who answers, ``beside`` for when.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.calls import CallFailed
from hapo_async.config import Config, EvalConfig
from hapo_async.driver.crew import Crew, Lent
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.judges import Judges
from hapo_async.errors import RunError
from hapo_async.evaluation import evaluate, verdicts
from hapo_async.types import SUCCESS, GroupHeader, GroupKey, GroupRequest, Judgement, Prompt, Sampling, Version

EVAL_TRIES = 3
FLOATING_SHARE = 4  # beside training's own groups an evaluation gets one place in so many


@dataclass(frozen=True)
class Scored:
    """One evaluated prompt: headers and judgements of its answers."""

    prompt: Prompt
    header: GroupHeader
    judgements: Sequence[Judgement]

    @property
    def verdicts(self) -> list[bool | None]:
        """True, False, or None where the verifier failed."""
        return [None if j.reward is None else j.reward >= SUCCESS for j in self.judgements]


Keep = Callable[[str, Scored, Any], Awaitable[None]]
"""Called with set, result and the reference to the Group, which may leave the object store afterwards."""


class Evaluator:
    """Asks every prompt of every set; a prompt whose generator fails goes to another one, a bounded number of times.

    run_dir: where each question's verdicts are appended to ``evals/``. settings: by set, where sets are evaluated
    differently. keep: gets every result with its answers.
    """

    def __init__(
        self,
        config: Config,
        sets: Mapping[str, Sequence[Prompt]],
        fleet: Fleet,
        judges: Judges,
        run_dir: Path | None = None,
        settings: Mapping[str, EvalConfig] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.config = config
        self.sets = sets
        self.fleet = fleet
        self.judges = judges
        self.run_dir = run_dir
        self.settings = settings or dict.fromkeys(sets, config.eval)
        self.keep = keep
        self._attempts = itertools.count()  # no two questions share a key, whatever was given up before

    async def run(self, step: int, mode: str = "barrier", version: Version | None = None) -> dict[str, float]:
        """Metrics of all sets, with their macro-average. version: the one that is evaluated; every answer of barrier and
        detached is checked against it. Raises RunError."""
        metrics: dict[str, float] = {}
        crew = self._crew(mode, version)
        try:
            results = await self.score_all(step, crew)
        finally:
            await crew.close()
        for name, scored in results.items():
            metrics |= summarise(name, scored, self.settings[name].k)
            if mode == "floating" and (newest := [s.header.newest.step for s in scored if s.header.newest]):
                metrics[f"eval/{evaluate.set_name(name)}/version_max"] = max(newest)
        if evaluate.MACRO not in self.sets:
            metrics |= evaluate.macro_average(metrics, list(self.sets))
        return metrics

    def _crew(self, mode: str, version: Version | None) -> Crew:
        width = self.config.generator.max_concurrent
        if mode == "floating":
            return Crew(self.fleet, max(1, width // FLOATING_SHARE))
        if mode == "detached":
            assert version is not None
            return Lent(self.fleet, width, version, self.config.generator.deadline_s)
        return Crew(self.fleet, width, version)

    async def score_all(self, step: int, crew: Crew | None = None) -> dict[str, list[Scored]]:
        """The results of every set, recorded in ``evals/``."""
        out = {}
        for name, prompts in self.sets.items():
            out[name] = await self.score(name, prompts, step, crew)
            if self.run_dir:
                results = [(s.prompt.uid, s.verdicts, verdicts.level_of(s.prompt)) for s in out[name]]
                await asyncio.to_thread(verdicts.append, self.run_dir, name, step, results)
        return out

    async def score(self, name: str, prompts: Sequence[Prompt], step: int, crew: Crew | None = None) -> list[Scored]:
        """All prompts of one set, in their order. What a generator takes down with it goes to the others, a bounded number
        of times. Raises RunError when something keeps failing."""
        crew = crew or self._crew("barrier", None)
        results: dict[int, Scored] = {}
        for _ in range(EVAL_TRIES):
            missing = [i for i in range(len(prompts)) if i not in results]
            if not missing:
                break
            generators = await crew.generators()
            shares = [missing[g :: len(generators)] for g in range(len(generators))]
            asking = [
                asyncio.create_task(self._share(crew, g, name, share, prompts, step, results))
                for g, share in zip(generators, shares, strict=True)
            ]
            try:
                await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        if len(results) < len(prompts):
            raise RunError(
                f"{len(prompts) - len(results)} of {len(prompts)} prompts of {name!r} could not be evaluated"
            )
        return [results[i] for i in range(len(prompts))]

    async def _share(
        self,
        crew: Crew,
        generator: Generator,
        name: str,
        indices: Sequence[int],
        prompts: Sequence[Prompt],
        step: int,
        results: dict[int, Scored],
    ) -> None:
        """One generator's prompts, some at a time; what fails is missing from ``results``."""
        for start in range(0, len(indices), crew.width):
            part = indices[start : start + crew.width]
            # Evaluation keys live in negative epochs: they never meet a training key.
            attempt = next(self._attempts)
            keys = {i: GroupKey(-1 - step, f"{name}/{prompts[i].uid}", attempt) for i in part}
            requests = [GroupRequest(keys[i], prompts[i].tokens, self._sampling(name)) for i in part]
            crew.asked(generator, list(keys.values()))
            try:
                await self.fleet.submit(generator, requests)
            except CallFailed as error:
                self.fleet.mark_failed(generator, error)
                return
            each = await asyncio.gather(
                *(self._one(crew, generator, name, keys[i], prompts[i]) for i in part), return_exceptions=True
            )
            for index, scored in zip(part, each, strict=True):
                if isinstance(scored, Scored):
                    results[index] = scored
                elif isinstance(scored, CallFailed):
                    self.fleet.mark_failed(generator, scored)
                else:
                    raise scored

    async def _one(self, crew: Crew, generator: Generator, name: str, key: GroupKey, prompt: Prompt) -> Scored:
        header, payload = await self.fleet.collect(generator, key, self.config.generator.deadline_s)
        crew.answered(header)
        scored = Scored(prompt, header, await self.judges.judge(payload, prompt, len(header.lengths)))
        if self.keep:
            await self.keep(name, scored, payload)
        return scored

    def _sampling(self, name: str) -> Sampling:
        e = self.settings[name]
        return Sampling(
            n=e.n,
            max_tokens=e.max_tokens or self.config.sampling.max_tokens,
            temperature=e.temperature,
            top_p=e.top_p,
            seed=self.config.seed + 1,
        )


def summarise(
    name: str, scored: Sequence[Scored], k: int | Sequence[int], bootstrap: int = 0, seed: int = 0
) -> dict[str, float]:
    """Accuracies, lengths and the version of one evaluated set."""
    metrics = evaluate.summarise(name, [s.verdicts for s in scored], k, bootstrap, seed)
    prefix = f"eval/{evaluate.set_name(name)}"
    lengths = [n for s in scored for n in s.header.lengths]
    reasons = [r for s in scored for r in s.header.finish_reasons]
    if lengths:
        metrics[f"{prefix}/length_mean"] = sum(lengths) / len(lengths)
        metrics[f"{prefix}/truncated_frac"] = sum(r == "length" for r in reasons) / len(reasons)
        metrics[f"{prefix}/version"] = min(s.header.oldest.step for s in scored if s.header.oldest)
    return metrics
