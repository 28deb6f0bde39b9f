"""The algorithms: a table of compositions, and the one loss path that runs all of them.

An algorithm is an advantage, a term for rollout tokens and one for teacher tokens (each a reference denominator, a
stabilisation mask and a weight, see ``hapo_async.upge``), a reduction, and the composition of a group
(``hapo_async.inject``). Each entry of the table is a small diff of a neighbour.

``objective`` is what the learner calls on a micro-batch; ``loss`` is the same for a batch that is whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from hapo_async import advantage as advantages
from hapo_async import gate, upge
from hapo_async.anchor import anchored
from hapo_async.config import Config
from hapo_async.errors import ConfigError
from hapo_async.objective import objective, trainable
from hapo_async.options import Option, merge
from hapo_async.upge import Contribution, Normaliser, Options, TokenBatch, Tokens

# --------------------------------------------------------------------------------------------------------------------
# Terms


@dataclass(frozen=True)
class Term:
    """What one kind of token contributes: J per token in words, its UPGE parts in words, and the function.

    ratio: compares with a proximal policy (then old tokens carry an importance weight). topk: needs the reference's
    top-K.
    """

    equation: str
    reference: str
    mask: str
    weight: str
    apply: Callable[[Tokens, Options], Contribution]
    ratio: bool = False
    topk: bool = False


def teacher_likelihood(t: Tokens, options: Options) -> Contribution:
    """F(pi) by the option ``shaping``: f | logp | identity."""
    shapings = {"f": upge.shaped(options["shaping_gamma"]), "logp": upge.THETA, "identity": upge.ONE}
    return upge.unmasked(shapings[options["shaping"]])(t, options)


CLIPPED = Term(
    "min(ρA, clip(ρ, 1−ε, 1+ε)·A)",
    upge.OLD.symbol,
    "clip: 0 where ρ left [1−ε, 1+ε] in A's direction",
    "1",
    upge.clipped,
    ratio=True,
)
LIKELIHOOD = Term("ℓ", upge.THETA.symbol, "1", "1", upge.unmasked(upge.THETA))
SHAPED = Term(
    "F(π), F = f(π) = π/(π+γ_F) | ℓ | π",
    upge.shaped(0.1).symbol + " (f) | sg(ℓ) (logp) | 0 (identity)",
    "1",
    "1",
    teacher_likelihood,
)
ANCHORED = Term(
    "A ≥ 0: min(ρA, clip(ρ)·A); A < 0: min(r̃A, clip(r̃)·A), r̃ = λρ − β·r_a, r_a = Σ_{k∈S} π_θ(k)/Z",
    "A ≥ 0: π_old; A < 0: two terms, λAρ − βA·r_a with r_a differentiable",
    "clip; A < 0: 0 where r̃ < 1−ε",
    "1",
    anchored,
    ratio=True,
    topk=True,
)

# --------------------------------------------------------------------------------------------------------------------
# Algorithms


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    composition: how a group becomes rows (``inject.compose``). advantage: a name of ``hapo_async.advantage``. rollout,
    teacher: terms of the two kinds of tokens; without a teacher term, teacher tokens are not part of the loss at all.
    teacher_weight: in words; the number is ``teacher_coefficient``. reduction: default of the option of that name, a
    key of ``upge.REDUCTIONS``. uses_gate: HAPO's gate decides about injection.
    """

    name: str
    title: str
    seed_papers: tuple[str, ...]
    equation: str
    composition: str
    advantage: str
    rollout: Term
    reduction: str
    teacher: Term | None = None
    teacher_weight: str = "1"
    uses_gate: bool = False
    reductions: tuple[str, ...] = ("TM", "SM", "SN", "SEQ")
    options: dict[str, Option] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option with its default."""
        return {name: option.default for name, option in self.all_options.items()}

    @property
    def all_options(self) -> dict[str, Option]:
        """The algorithm's own options and those that all share."""
        reduction = Option(
            self.reduction,
            "how tokens are weighted: " + "; ".join(f"{r} {upge.REDUCTIONS[r]}" for r in self.reductions),
            self.reductions,
        )
        return {**self.options, "reduction": reduction, **SHARED_OPTIONS}

    @property
    def needs(self) -> frozenset[str]:
        """What the learner must supply, whatever the options: prox, entropy, topk, ref_logp."""
        return self.requires(self.defaults)

    def requires(self, options: Options) -> frozenset[str]:
        """What the learner must supply under resolved ``options``. "entropy" means with its gradient."""
        return frozenset(
            name
            for name, needed in {
                "prox": self.rollout.ratio,
                "topk": self.rollout.topk and options["beta"] != 0,
                "entropy": options["entropy_coef"] != 0,
            }.items()
            if needed
        )

    def resolve(self, options: Mapping[str, Any], config: Config | None = None) -> dict[str, Any]:
        """Defaults, what a run's ``config`` implies (l_max, the gate's gamma), and the given options; all checked.

        Raises ConfigError for an unknown option (with the nearest name) and for a bad value.
        """
        implied: dict[str, Any] = {}
        if config is not None:
            implied["l_max"] = config.sampling.max_tokens
            if self.uses_gate:
                implied["gamma"] = config.gate.gamma
        known = self.all_options
        return merge(self.name, known, {k: v for k, v in implied.items() if k in known}, options)

    def check_config(self, config: Config) -> dict[str, Any]:
        """The resolved options of a run. Raises ConfigError with value, rule and fix for a config that this algorithm
        cannot learn from, before anything is started."""
        n, options = config.sampling.n, self.resolve(config.options, config)
        if self.composition != "demonstrations" and advantages.needs_group(self.advantage) and n < 2:
            raise ConfigError(
                f"sampling.n={n} with algorithm={self.name!r}: its advantage compares the answers of a group, and a "
                "single answer always has advantage 0. Set sampling.n to 2 or more (the papers: 8), or use algorithm=sft."
            )
        if self.composition == "append" and n < 3:
            raise ConfigError(
                f"sampling.n={n} with algorithm={self.name!r}: one of the N answers is the demonstration, and an advantage needs "
                "two sampled ones beside it. Set sampling.n to 3 or more (the paper: 8)."
            )
        if self.uses_gate:
            gate.check_config(config)
        if self.uses_gate and "gamma" in config.options and options["gamma"] != config.gate.gamma:
            raise ConfigError(
                f"options.gamma={options['gamma']} contradicts gate.gamma={config.gate.gamma}: {self.name!r} takes the gate's "
                "threshold from one place. Remove options.gamma and set gate.gamma."
            )
        if self.composition == "switch" and not -1 <= options["gamma"] <= n:
            raise ConfigError(
                f"options.gamma={options['gamma']} with sampling.n={n}: the switch compares a count of successes, so "
                f"it must lie between -1 (never the demonstration) and {n} (always). Set options.gamma within that."
            )
        return options

    def describe(self) -> dict[str, Any]:
        """The five parts, the equation, the papers and the defaults, as plain data."""
        terms = {"rollouts": self.rollout} | (
            {"teacher": self.teacher} if self.teacher and self.teacher is not self.rollout else {}
        )
        weights = {k: t.weight for k, t in terms.items()} | (
            {"teacher": self.teacher_weight} if "teacher" in terms else {}
        )
        if self.rollout.ratio:
            weights["rollouts"] += " · w (importance weight of old tokens, staleness.correction=tis)"
        return {
            "name": self.name,
            "title": self.title,
            "seed_papers": list(self.seed_papers),
            "equation": self.equation,
            "composition": self.composition,
            "uses_gate": self.uses_gate,
            "advantage": f"{self.advantage}: {advantages.ADVANTAGES[self.advantage].equation}",
            "reference": {k: t.reference for k, t in terms.items()},
            "mask": {k: t.mask for k, t in terms.items()},
            "weight": weights,
            "reduction": f"{self.reduction}: {upge.REDUCTIONS[self.reduction]}",
            "J_per_token": {k: t.equation for k, t in terms.items()},
            "defaults": self.defaults,
            "options": {name: option.help for name, option in self.all_options.items()},
        }


# --------------------------------------------------------------------------------------------------------------------
# Options


SHARED_OPTIONS = {
    "l_max": Option(
        1024.0, "constant length L of reductions SN and PN; in a run sampling.max_tokens", low=1, aliases=("L", "L_max")
    ),
    "entropy_coef": Option(
        0.0, "entropy bonus: coefficient of the token entropy, added to J with the same reduction", low=0
    ),
}
CLIP_OPTIONS = {
    "clip": Option(True, "clip the ratio; false lets every rollout token train"),
    "eps": Option(0.2, "ratio clip ε", low=0, high=1, aliases=("epsilon", "ε")),
    "eps_high": Option(None, "upper clip; null: the same as eps", low=0, kind=float),
    "std": Option(True, "divide the advantage by the group's std"),
}
SHAPING_OPTIONS = {
    "teacher_weight": Option(
        "advantage", "what multiplies the teacher's F: its advantage, or one", ("one", "advantage")
    ),
    "shaping": Option("f", "F of teacher tokens: f = π/(π+γ_F), logp = ℓ, identity = π", ("f", "logp", "identity")),
    "shaping_gamma": Option(0.1, "γ_F of f", low=0, low_open=True),
}
HAPO_OPTIONS = {
    "teacher_weight": replace(SHAPING_OPTIONS["teacher_weight"], default="one"),  # eq. 9 has no A
    "confidence": Option(
        "gate", "c inside F: gate (c decides only) | 1-c | 1-c/gamma (not below 0)", ("gate", "1-c", "1-c/gamma")
    ),
    "gamma": Option(0.8, "the gate's threshold, for 1-c/gamma; in a run gate.gamma", low=0, high=1, aliases=("γ",)),
    "normaliser": Option(
        "shared",
        "teacher tokens divided with the rollouts (eq. 8), or separate: by their own count",
        ("shared", "separate"),
        aliases=("normalizer",),
    ),
}
ANCHOR_OPTIONS = {
    "lam": Option(1.05, "λ: push of the failed token", low=0, low_open=True, aliases=("lambda", "λ")),
    "beta": Option(0.1, "β: pull towards the reference's top-K", low=0, aliases=("β",)),
    "k": Option(8, "K: ids of the reference's top-K", low=1, aliases=("K",)),
    "anchor_clip": Option(
        "joint", "joint: clip r̃ (paper); push_only: clip λρ alone, always pull", ("joint", "push_only")
    ),
    "r_anchor_max": Option(None, "upper bound of r_a, without gradient beyond; null: none", low=0, kind=float),
}

# --------------------------------------------------------------------------------------------------------------------
# The table

GRPO = Algorithm(
    name="grpo",
    title="Group Relative Policy Optimization",
    seed_papers=("000", "002", "003", "004"),
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ], ρ = exp(ℓ − ℓp)",
    composition="rollouts",
    advantage="grpo",
    rollout=CLIPPED,
    reduction="TM",
    options=CLIP_OPTIONS,
)
DR_GRPO = replace(
    GRPO,
    name="dr_grpo",
    title="Dr.GRPO: GRPO without the std, divided by a constant length",
    seed_papers=("002",),
    advantage="dr_grpo",
    reduction="SN",
    options=CLIP_OPTIONS | {"std": replace(CLIP_OPTIONS["std"], default=False)},
)
SFT = Algorithm(
    name="sft",
    title="Supervised fine-tuning on demonstrations",
    seed_papers=("000", "002", "003"),
    equation="J = reduce[ ℓ ]",
    composition="demonstrations",
    advantage="none",
    rollout=LIKELIHOOD,
    teacher=LIKELIHOOD,
    reduction="TM",
)
LUFFY = replace(
    GRPO,
    name="luffy",
    title="LUFFY: off-policy guidance with policy shaping",
    seed_papers=("002",),
    equation="J = reduce[ rollouts: min(ρA, clip(ρ)·A); teacher: A·f(π), f(π) = π/(π+γ_F) ]",
    composition="append",
    teacher=SHAPED,
    teacher_weight="A | 1 (teacher_weight)",
    options=CLIP_OPTIONS | SHAPING_OPTIONS,
)
HPT = replace(
    DR_GRPO,
    name="hpt",
    title="Hybrid Post-Training: RL or SFT by the prompt's successes",
    equation="J = mean over prompts[ α·mean over rollouts(Σ_t min(ρA, clip(ρ)·A)/L_max) + β·sft_coef·mean_t ℓ ], "
    "β = 1 − α = [S ≤ γ]",
    composition="switch",
    teacher=LIKELIHOOD,
    teacher_weight="sft_coef",
    reduction="PN",
    reductions=("PN",),
    options=DR_GRPO.options
    | {
        "gamma": Option(0, "demonstration iff S <= gamma; -1 never, N always", low=-1, aliases=("γ",)),
        "sft_coef": Option(1.0, "weight of the demonstration", low=0),
    },
)
HAPO = replace(
    LUFFY,
    name="hapo",
    title="HAPO: Hindsight-Anchored Policy Optimization",
    seed_papers=("000",),
    equation="J = reduce[ rollouts: min(ρA, clip(ρ)·A); teacher: F(π_θ, c) ]; the teacher replaces argmin R where "
    "c = (1+S)/(2+N) < γ",
    composition="ssi",
    teacher_weight="1 | A (teacher_weight) × 1 | (1−c) | (1−c/γ)₊ (confidence)",
    uses_gate=True,
    options=LUFFY.options | HAPO_OPTIONS,
)
APO = replace(
    GRPO,
    name="apo",
    title="APO: Anchored Policy Optimization",
    seed_papers=("004",),
    equation=f"J = reduce[ {ANCHORED.equation} ]",
    rollout=ANCHORED,
    options=CLIP_OPTIONS | ANCHOR_OPTIONS,
)
HAPO_APO = replace(
    HAPO,
    name="hapo_apo",
    title="HAPO's gate with APO on the failures that stay",
    seed_papers=("000", "004"),
    equation=f"J = reduce[ rollouts: {ANCHORED.equation}; teacher: F(π_θ, c) ]; the teacher replaces argmin R where "
    "c = (1+S)/(2+N) < γ",
    rollout=ANCHORED,
    options=HAPO.options | ANCHOR_OPTIONS,
)

TABLE: dict[str, Algorithm] = {a.name: a for a in (SFT, GRPO, DR_GRPO, LUFFY, HPT, HAPO, APO, HAPO_APO)}


def names() -> list[str]:
    return list(TABLE)


def get(name: str) -> Algorithm:
    """Raises ConfigError with the nearest name for an unknown one."""
    if name in TABLE:
        return TABLE[name]
    near = difflib.get_close_matches(str(name).lower().replace("-", "_").replace("+", "_"), TABLE, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown algorithm {name!r}.{hint} There are: {', '.join(TABLE)}.")


def loss(name: str, batch: TokenBatch, **options: Any) -> tuple[Tensor, dict[str, float]]:
    """Loss of the named algorithm on a batch that is the whole mini-batch of one update.

    options: the algorithm's own (``get(name).defaults``), and ``correction``, ``cap`` of ``hapo_async.staleness``
    (default off). Returns a scalar whose gradient is the algorithm's, and numbers; ``stats["value"]`` is -J. Where
    ``confidence`` or ``group_size`` is missing it is counted from the batch (confidence from reward [sequences]: S
    rollouts with R = 1, in a group that is whole after injection). Raises ConfigError for a bad name or option,
    ValueError for a bad batch.
    """
    algorithm = get(name)
    correction, cap = options.pop("correction", "off"), options.pop("cap", 2.0)
    resolved = algorithm.resolve(options)
    batch = trainable(algorithm, batch)
    if batch.confidence is None and resolved.get("confidence", "gate") != "gate":
        batch = replace(batch, confidence=upge.group_confidence(batch))
    if batch.group_size is None and resolved["reduction"] == "PN":
        batch = replace(batch, group=batch.groups, group_size=upge.group_sizes(batch))
    total, stats = objective(algorithm, resolved, batch, Normaliser.of(batch), correction=correction, cap=cap)
    numbers = {key: mean.value for key, mean in stats.items()}
    return total, numbers | {"value": float(total.detach())}
