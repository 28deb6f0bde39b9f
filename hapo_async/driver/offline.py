"""Offline runs: answers that are sampled and judged once, kept in ``data.answers``, and trained on by the same loop.

    generate   generators, verifiers -> answers.jsonl   once; a killed one continues; sealed when complete
    score      learner, before its first step -> reference.safetensors   where the algorithm needs log-probs of the
               reference, which is the policy before training
    take       the sampler issues cached groups, without a generator
    measure    the loss on held-out prompts at each evaluation; ``early`` says when it has stopped improving

While an offline run trains, its generators serve evaluations alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors import placement
from actors.calls import answer
from actors.learner import LearnerGroup
from hapo_async import batch, checkpoint, inject
from hapo_async.algorithms import Algorithm
from hapo_async.answers import AnswerCache
from hapo_async.config import Config, EvalConfig
from hapo_async.driver.evaluation import Evaluator, Scored
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.setup import Prepared, check_libraries
from hapo_async.errors import ConfigError, DataError, RunError, UserError
from hapo_async.guardian import Guardian
from hapo_async.holdout import EarlyStop, Split
from hapo_async.recipe import Recipe
from hapo_async.rundir import RunDir
from hapo_async.sequences import Sequence as TokenSequence
from hapo_async.sequences import TrainGroup, to_score
from hapo_async.types import GateDecision, GatedGroup, Group, GroupHeader, GroupKey, Judgement, Prompt, Version
from hapo_async.words import plural

log = logging.getLogger(__name__)

Say = Callable[[str], None]

NAME = "answers"  # what generators and logs call the set of training prompts
FETCH_DEADLINE_S = 60.0
SCORED_AT_ONCE = 64  # groups whose tokens the driver holds while they are scored
HELD_OUT_EPOCH = -1


@dataclass(frozen=True)
class CachedGroup:
    """A group as the sampler admits it. payload: a reference to the Group. logp_ref: see TrainGroup."""

    header: GroupHeader
    payload: Any
    judgements: list[Judgement]
    logp_ref: tuple[np.ndarray, ...] | None


class Offline:
    """The cached answers of a run. ``open`` starts nothing; after ``generate`` and ``score`` groups can be taken."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        options: Mapping[str, Any],
        prompts: Sequence[Prompt],
        cache: AnswerCache,
        early: EarlyStop,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.options = options
        self.prompts = {p.uid: p for p in prompts}
        self.cache = cache
        self.early = early
        self.split = Split(frozenset(), ())
        self._say: Say = log.info

    @classmethod
    def open(cls, prepared: Prepared, run_dir: Path, resumed: checkpoint.Checkpoint | None = None) -> Offline:
        """Reads what is there. Raises ConfigError for answers that do not fit the run, and for a run that has trained
        but lost its answers; DataError for damaged ones, and for complete ones that nothing can be learnt from."""
        c = prepared.config
        patience = int(prepared.options["patience"])
        folder = Path(c.data.answers).expanduser() if c.data.answers else run_dir / NAME
        cache = AnswerCache.open(folder, Recipe.of(c, prepared.prompts, prepared.model_path))
        early = EarlyStop(patience, **(resumed.driver.get("offline", {}) if resumed else {}))
        offline = cls(c, prepared.algorithm, prepared.options, prepared.prompts, cache, early)
        if resumed and resumed.step > 0:
            offline._check_resumable(resumed.step)
        if cache.complete:
            offline.divide()
        return offline

    @property
    def needs_reference(self) -> bool:
        """Whether the algorithm looks at log-probs of the sampled tokens under the reference."""
        return "ref_logp" in self.algorithm.requires(self.options)

    def _check_resumable(self, step: int) -> None:
        missing = None
        if not self.cache.complete:
            missing = "complete answers"
        elif self.needs_reference and not self.cache.has_reference:
            missing = "the reference's log-probs"
        if missing:
            raise ConfigError(
                f"the run has trained {plural(step, 'step')}, but {str(self.cache.folder)!r} no longer holds {missing}, which "
                "come from the policy before its first step. Put the folder back, or start anew: run.resume=never."
            )

    def divide(self) -> None:
        """Which prompts train, which are held out. Raises DataError when none is left to train on."""
        self.split = Split.of(self.cache.entries, float(self.options.get("holdout", 0.0)), self.config.seed)
        if not self.split.train:
            raise DataError(
                f"the answers in {str(self.cache.folder)!r} leave nothing to train on: {self.split.text()}. A prompt "
                "trains when some of its answers are right and others wrong. Take easier or harder prompts, more answers "
                "(sampling.n), a higher sampling.temperature, or look at the verifier (hapo-async check-verifier)."
            )

    def status(self) -> dict[str, Any]:
        """How far the answers are, for ``status.json``."""
        there, total = len(self.cache.entries), len(self.prompts)
        return {"answers": {"folder": str(self.cache.folder), "done": there, "of": total}}

    # ---------------------------------------------------------------- stage 1

    async def generate(self, fleet: Fleet, judges: Judges, say: Say) -> None:
        """Samples and judges what is missing. Raises RunError when something keeps failing; what is done is kept."""
        c, self._say = self.config, say
        if self.cache.complete:
            say(f"answers: {self.cache.folder}: complete, used as they are; {self.split.text()}")
            return
        try:
            await asyncio.to_thread(self.cache.begin)
            missing = self.cache.missing(list(self.prompts.values()))
            say(
                f"answers: sampling {c.sampling.n} to each of {plural(len(missing), 'prompt')} at temperature "
                f"{c.sampling.temperature:g} into {self.cache.folder} ({len(self.cache.entries)} are there)"
            )
            await self._sample(missing, fleet, judges)
            await asyncio.to_thread(self.cache.seal)
            self.divide()
        except OSError as error:
            raise RunError(f"the answers cannot be written to {str(self.cache.folder)!r}: {error.strerror}") from None
        except UserError as error:  # too late for exit code 2: the run has started
            raise RunError(str(error)) from None
        finally:
            self.cache.close()
        if self.cache.unjudged:
            say(f"answers: the verifier failed on {self.cache.unjudged}, which take no part")
        say(f"answers: complete; {self.split.text()}")

    async def _sample(self, prompts: list[Prompt], fleet: Fleet, judges: Judges) -> None:
        s = self.config.sampling
        settings = {NAME: EvalConfig(n=s.n, sampling={"temperature": s.temperature, "max_tokens": s.max_tokens})}
        evaluator = Evaluator(self.config, {NAME: prompts}, fleet, judges, settings=settings, keep=self._keep)
        await evaluator.score(NAME, prompts, 0)

    async def _keep(self, name: str, scored: Scored, payload: Any) -> None:
        group = await answer(payload, FETCH_DEADLINE_S, scored.header.generator)
        self.cache.append(scored.prompt, group, scored.judgements)
        done, total = len(self.cache.entries), len(self.prompts)
        if done * 10 // total > (done - 1) * 10 // total:
            self._say(f"answers: {done} of {plural(total, 'prompt')}")

    async def score(self, learner: LearnerGroup, say: Say) -> None:
        """Log-probs of the answers under the learner's weights, which must be those that it started from."""
        if not self.needs_reference or self.cache.has_reference:
            return
        uids = self.cache.mixed()
        say(f"answers: scoring those of {plural(len(uids), 'prompt')} under the reference")
        scores: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(uids), SCORED_AT_ONCE):
            part = uids[start : start + SCORED_AT_ONCE]
            groups = await asyncio.to_thread(self._read, part)
            sequences = [s for group in groups for s in sequences_of(group)]
            found = iter(await learner.score(sequences))
            for uid, group in zip(part, groups, strict=True):
                scores[uid] = [next(found) if a.length else np.zeros(0, np.float32) for a in group.answers]
        try:
            await asyncio.to_thread(self.cache.write_reference, scores)
        except OSError as error:
            raise RunError(
                f"the reference's log-probs cannot be written to {str(self.cache.folder)!r}: {error.strerror}. Make it "
                "writable, or copy it and name the copy in data.answers."
            ) from None

    def _read(self, uids: Sequence[str]) -> list[Group]:
        return [self.cache.read(self.prompts[uid], GroupKey(HELD_OUT_EPOCH, uid, 0)) for uid in uids]

    # ---------------------------------------------------------------- stage 2

    def trains(self, uid: str) -> bool:
        """Whether a prompt is trained on, rather than held out or left out."""
        return uid in self.split.train

    def take(self, key: GroupKey, prompt: Prompt) -> CachedGroup:
        """The cached answers to a prompt, put into the object store, under a key of this epoch."""
        entry = self.cache.entries[prompt.uid]
        reference = self.cache.reference(prompt.uid) if self.needs_reference else None
        payload = ray.put(self.cache.read(prompt, key))
        return CachedGroup(entry.header(key, prompt), payload, list(entry.judgements), reference)

    async def measure(self, learner: LearnerGroup, version: Version) -> dict[str, float]:
        """The held-out loss at the learner's version; ``early`` takes note of it."""
        groups = await asyncio.to_thread(self._held_out)
        if not groups:
            return {}
        c, pairs = self.config, self.options.get("pairs")
        plans = batch.plan_step(groups, c.learner.ranks, 1, version, seed=c.seed, pairs=pairs)
        loss = await learner.holdout(plans)
        self.early.see(version.step, loss)
        return {"offline/holdout_loss": loss}

    def _held_out(self) -> list[TrainGroup]:
        found = [self._compose(self.prompts[uid]) for uid in self.split.held_out]
        return [train for train in found if train is not None]

    def _compose(self, prompt: Prompt) -> TrainGroup | None:
        cached = self.take(GroupKey(HELD_OUT_EPOCH, prompt.uid, 0), prompt)
        closed = GateDecision(False, 0, 0, 0.0, reason="offline")
        gated = GatedGroup(cached.header, cached.payload, prompt, tuple(cached.judgements), closed)
        a = self.algorithm
        train = inject.compose(a.composition, gated, a.advantage_for(self.options), options=self.options, keep=a.keep)
        return train and replace(train, logp_ref=cached.logp_ref)

    def counts(self) -> dict[str, float]:
        """How many prompts train, are held out, and are left out for which reason: metrics of the first row."""
        out = {"train": len(self.split.train), "held_out": len(self.split.held_out), **self.split.left_out}
        return {f"offline/prompts/{name.replace(' ', '_')}": float(count) for name, count in out.items()}


def sequences_of(group: Group) -> list[TokenSequence]:
    """The answers of a group that hold a token, to be scored at temperature 1."""
    return [to_score(group.prompt_tokens, a.tokens, a.sources) for a in group.answers if a.length]


# --------------------------------------------------------------------------------------------------------------------
# Stage 1 alone


def generate_only(prepared: Prepared, say: Say) -> Path:
    """Samples the answers without a learner; returns their folder. Raises UserError before anything starts, RunError
    after."""
    c, began = prepared.config, time.monotonic()
    with RunDir(c) as folder:
        offline = Offline.open(prepared, folder.path)
        if offline.cache.complete:
            say(f"answers: {offline.cache.folder}: complete already; {offline.split.text()}")
            return offline.cache.folder

        def note(state: str) -> None:
            if not folder.has_metrics:  # what a run says of its training stays
                folder.write_status({"state": state, "seconds": time.monotonic() - began, **offline.status()})

        def tell(text: str) -> None:
            say(text)
            note("running")

        with Guardian(folder.path) as guardian:
            cluster = placement.join(c.generator.count)
            try:
                guardian.tell(cluster.pids)
                check_libraries(c, cluster.device == "cuda")
                asyncio.run(_generate(offline, prepared, cluster, tell))
            except BaseException:
                with contextlib.suppress(OSError):
                    note("failed")
                raise
            finally:
                cluster.stop()
        note("done")
        return offline.cache.folder


def preview(prepared: Prepared) -> str:
    """What there is of the answers, in a line for people. Raises UserError where they do not fit the run."""
    offline = Offline.open(prepared, RunDir(prepared.config).path)
    cache, total = offline.cache, plural(len(offline.prompts), "prompt")
    if cache.complete:
        return f"answers: {cache.folder}: complete; {offline.split.text()}"
    return f"answers: {cache.folder}: {len(cache.entries)} of {total} there; the others are sampled first"


async def _generate(offline: Offline, prepared: Prepared, cluster: placement.Cluster, say: Say) -> None:
    share = placement.cpu_share(cluster, prepared.config.generator.count)
    fleet = await Fleet.start(prepared.config, prepared.model_path, cluster, share, lambda: None)
    try:
        judges = await Judges.start(prepared.config)
        try:
            await offline.generate(fleet, judges, say)
        finally:
            await judges.close()
    finally:
        await fleet.close()
