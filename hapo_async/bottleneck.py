"""What limits a step: its times as one sentence that says what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Bottleneck(NamedTuple):
    """component: generator | verifier | learner | sync | staleness, "" when nothing was timed. advice: one sentence."""

    component: str
    advice: str


# Both sides idle for at least this share of a step: neither is slow, they take turns.
_TURNS_SHARE = 0.15


def bottleneck(timings: Mapping[str, float], head_start_s: float = 0.0) -> Bottleneck:
    """Decides from a step's ``time/*`` metrics what limits it. Missing times count as 0. The largest of the learner's
    four states decides:

    learning -> learner; publishing -> sync; waiting for late groups -> staleness; waiting for a batch -> generator, or
    verifier when groups spend longer there, or staleness when the generators waited for weights in the same step (then
    the two sides take turns, which only a larger bound can change).

    Evaluation and checkpoints never limit, since they are asked for: shares are of the time without them, and what
    generators waited while the learner was held by one is not counted. head_start_s: how long the step before was held
    that way. The generators then ran ahead, and a learner that finds its batch ready says nothing about who is slower.
    """

    def seconds(name: str) -> float:
        value = timings.get(f"time/{name}_s")
        return value if value is not None and math.isfinite(value) and value > 0 else 0.0

    states = {name: seconds(name) for name in ("learn", "wait_for_batch", "wait_for_stale", "sync")}
    if not any(states.values()):
        return Bottleneck("", "no stage was timed in this step.")
    asked = seconds("eval") + seconds("checkpoint")
    total = max(seconds("step") - asked, sum(states.values()))
    step = "the step without its evaluation" if seconds("eval") > 0.05 * total else "the step"
    state = max(states, key=lambda name: states[name])
    share = states[state] / total
    held = min(max(seconds("wait_for_weights") - asked, 0.0) / total, 1.0)
    if state == "wait_for_batch":
        return _batch_is_late(step, share, held, seconds("verify"), seconds("generate"))
    if state == "learn":
        return _learner_computes(step, share, held, ahead=head_start_s >= 0.5 * states["learn"])
    if state == "sync":
        return Bottleneck(
            "sync",
            f"sync: handing out weights took {share:.0%} of {step}; train more per step (train.batch_prompts) "
            "or raise weights.bucket_bytes.",
        )
    return Bottleneck(
        "staleness",
        f"staleness: the learner waited {share:.0%} of {step} for groups about to grow too old; raise max_staleness, "
        "or lower staleness.late_deadline_s or sampling.max_tokens.",
    )


def _learner_computes(step: str, share: float, held: float, ahead: bool) -> Bottleneck:
    if ahead:
        return Bottleneck(
            "learner",
            f"learner: it computed {share:.0%} of {step} on groups that were sampled while an evaluation or a checkpoint "
            "held it; other steps say more.",
        )
    waited = f" while generators waited for weights {held:.0%} of it" if held > 0.05 else ""
    return Bottleneck(
        "learner",
        f"learner: it computed {share:.0%} of {step}{waited}; add ranks (learner.ranks) "
        "or raise learner.micro_batch_tokens.",
    )


def _batch_is_late(step: str, share: float, held: float, verify_s: float, generate_s: float) -> Bottleneck:
    if verify_s > generate_s > 0:
        return Bottleneck(
            "verifier",
            f"verifier: the learner waited {share:.0%} of {step} for a batch, and groups spent {verify_s:.1f} s in "
            f"verification against {generate_s:.1f} s in generation; raise verifier.workers or verifier.count.",
        )
    if min(share, held) >= _TURNS_SHARE:
        return Bottleneck(
            "staleness",
            f"staleness: generators and learner take turns (the learner waited {share:.0%} of {step} for rollouts, "
            f"generators {held:.0%} for weights); raise max_staleness so that they overlap.",
        )
    return Bottleneck(
        "generator",
        f"generator: the learner waited {share:.0%} of {step} for rollouts; add generators (generator.count) "
        "or raise generator.max_concurrent.",
    )
