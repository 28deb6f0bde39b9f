"""From a judged group to the buffer: gate, composition and advantage, or ``dropped`` when nothing is left to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from hapo_async import gate, inject
from hapo_async.algorithms import Algorithm
from hapo_async.buffer import Buffer, Ready
from hapo_async.config import Config
from hapo_async.driver.barren import Barren
from hapo_async.driver.retries import Retries
from hapo_async.ledger import Ledger
from hapo_async.posterior import Posteriors
from hapo_async.types import Fault, GateDecision, GatedGroup, GroupHeader, Judgement, Prompt


class Intake:
    """Decides about each group once, when it is complete. posteriors: what the pooled gate knows of each prompt.
    prompts: those of one epoch."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        options: Mapping[str, Any],
        ledger: Ledger,
        buffer: Buffer,
        prompts: int,
        retries: Retries,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.options = options
        self.ledger = ledger
        self.buffer = buffer
        self.posteriors = Posteriors(config.gate.decay)
        self._barren = Barren(config.train.batch_prompts, prompts)
        self._retries = retries

    def admit(
        self,
        header: GroupHeader,
        payload: Any,
        prompt: Prompt,
        judgements: list[Judgement],
        step: int,
        logp_ref: tuple[np.ndarray, ...] | None = None,
    ) -> None:
        """step: the learner's. Raises RunError when there has been nothing to train on for many batches."""
        if hopeless := next((j.detail for j in judgements if j.fault is Fault.PROMPT), ""):
            self._retries.hopeless(header.key, step + 1, hopeless, header.lengths)
            self._barren.dropped("unjudgeable", judgements)
            return
        gated = GatedGroup(header, payload, prompt, tuple(judgements), self._decide(header, prompt, judgements, step))
        train = inject.compose(
            self.algorithm.composition,
            gated,
            self.algorithm.advantage_for(self.options),
            options=self.options,
            keep=self.algorithm.keep,
            advantage_group=self.config.gate.advantage_group,
            step=step,
            teacher=self.config.gate.teacher,
            seed=self.config.seed,
        )
        if train is None:
            reason = inject.why_nothing(gated, self.options)
            self.ledger.drop(header.key, reason)
            self._barren.dropped(reason, judgements)
            return
        self._barren.admitted()
        self.ledger.admit(header.key)
        self.buffer.add(Ready(gated, replace(train, logp_ref=logp_ref)))

    def _decide(self, header: GroupHeader, prompt: Prompt, judgements: list[Judgement], step: int) -> GateDecision:
        pooled = self.config.gate.decision == "pooled"
        rewards = [j.reward or 0.0 for j in judgements]
        judged = [j.is_judged for j in judgements]
        decision = gate.decide(
            rewards,
            judged,
            prompt.teachers,
            header.lengths,
            header.answer_steps,
            config=self.config.gate,
            rng_seed=gate.seed_of(header.key, self.config.seed),
            progress=Fraction(step, self.config.train.steps),
            past=self.posteriors.before(header.key) if pooled else None,
        )
        if pooled and not decision.is_unverified:
            self.posteriors.record(header.key, decision.successes, decision.judged - decision.successes)
        return decision
