"""Settings that contradict each other, each refused with the values, the rule and the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hapo_async.words import plural

if TYPE_CHECKING:
    from hapo_async.config.sections import Config


def check(c: Config) -> None:
    """Raises ValueError at the first contradiction."""
    _check_batch(c)
    _check_eval(c)
    _check_flow(c)
    _check_colocated(c)


def _check_batch(c: Config) -> None:
    per_update, rest = divmod(c.train.batch_prompts, c.learner.mini_batches)
    if rest:
        raise ValueError(
            f"train.batch_prompts={c.train.batch_prompts} is not divisible by learner.mini_batches={c.learner.mini_batches}. "
            f"Use {per_update * c.learner.mini_batches or c.learner.mini_batches} prompts, or another number of mini-batches."
        )
    if per_update % c.learner.ranks:
        raise ValueError(
            f"a mini-batch of {per_update} prompts (train.batch_prompts / learner.mini_batches) is not divisible by "
            f"learner.ranks={c.learner.ranks}. Make train.batch_prompts a multiple of {c.learner.ranks * c.learner.mini_batches}."
        )


def _check_eval(c: Config) -> None:
    if c.eval.k > c.eval.n:
        raise ValueError(
            f"eval.k={c.eval.k} is larger than eval.n={c.eval.n}: pass@k needs k answers. Raise eval.n or lower eval.k."
        )
    if c.eval.temperature == 0 and c.eval.n > 1:
        raise ValueError(
            f"eval.n={c.eval.n} with eval.sampling.temperature=0 samples the same answer each time. Set a temperature, or "
            "eval.n=1."
        )


def _check_flow(c: Config) -> None:
    lag = c.staleness.force_lag
    if lag and c.max_staleness != lag:
        raise ValueError(
            f"staleness.force_lag={lag} trains on groups that are {plural(lag, 'step')} old, but "
            f"max_staleness={c.max_staleness}. Set max_staleness={lag} as well, or staleness.force_lag=0."
        )
    if c.eval.mode == "detached" and c.generator.count < 2:
        raise ValueError(
            f"eval.mode=detached takes one generator out of sampling, but generator.count={c.generator.count}. Use at least "
            "two generators, or eval.mode=barrier."
        )
    if c.is_timing_free and c.eval.mode in ("detached", "floating"):
        cause = f"staleness.force_lag={lag}" if lag else "max_staleness=0"
        raise ValueError(
            f"eval.mode={c.eval.mode} goes on beside training, but with {cause} no batch may depend on timing. Use "
            "eval.mode=barrier."
        )


def _check_colocated(c: Config) -> None:
    if c.generator.placement != "colocated":
        return
    if c.max_staleness > 0:
        raise ValueError(
            f"generator.placement=colocated lets generators and learner take turns, which is synchronous training, but "
            f"max_staleness={c.max_staleness}. Set max_staleness=0, or generator.placement=disaggregated."
        )
    if c.weights.transport in ("gloo", "nccl"):
        raise ValueError(
            f"weights.transport={c.weights.transport} is a collective among processes that work at the same time, but with "
            "generator.placement=colocated they take turns. Use weights.transport=auto, or generator.placement=disaggregated."
        )
