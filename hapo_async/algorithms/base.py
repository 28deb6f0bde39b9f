"""What an algorithm is: an advantage, terms for rollouts and teachers, a reduction, the rows it trains, its options.

The rows are in ``online``, ``hybrid`` and ``offline``, beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hapo_async import advantage as advantages
from hapo_async import gate
from hapo_async.config import Config
from hapo_async.errors import ConfigError
from hapo_async.options import Option, merge
from hapo_async.reduction import REDUCTIONS
from hapo_async.terms import Term
from hapo_async.upge import Options

KEEPS = {
    "all": "all",
    "judged": "answers with a verdict",
    "nonzero": "answers whose advantage is not 0; the others leave the denominators too",
    "paired": "answers that are in a preference pair",
}
"""Which rows of a composed group train."""

COMPOSITIONS = {
    "rollouts": "the sampled answers",
    "demonstrations": "the teacher's solution alone",
    "append": "the sampled answers and one teacher solution",
    "ssi": "the sampled answers; an open gate puts the teacher's solution in the place of the worst",
    "switch": "the sampled answers or the teacher's solution, or both with weights, by the prompt's successes",
}

SHARED_OPTIONS = {
    "l_max": Option(
        1024.0, "constant length L of reductions SN and PN; in a run sampling.max_tokens", low=1, aliases=("L", "L_max")
    ),
    "entropy_coef": Option(
        0.0, "entropy bonus: coefficient of the token entropy, added to J with the same reduction", low=0
    ),
    "skip_grad_norm": Option(
        None, "an update whose gradient norm is larger is not applied; null: none", low=0, low_open=True, kind=float
    ),
}


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    composition: a key of COMPOSITIONS. keep: a key of KEEPS. offline: the groups are cached answers of the initial
    policy. advantage: a name of ``hapo_async.advantage`` (with a critic, the learner computes it). rollout, teacher:
    terms of the two kinds of tokens; without a teacher term, teacher tokens are not part of the loss at all.
    teacher_weight: in words, where options change it. reduction: default of the option of that name, one of
    ``reductions``. uses_gate: HAPO's gate decides about injection. note: what a user must know about its source.
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
    teacher_weight: str = ""
    uses_gate: bool = False
    offline: bool = False
    keep: str = "all"
    reductions: tuple[str, ...] = ("TM", "SM", "SN", "SEQ")
    options: dict[str, Option] = field(default_factory=dict)
    note: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option with its default."""
        return {name: option.default for name, option in self.all_options.items()}

    @property
    def all_options(self) -> dict[str, Option]:
        """The algorithm's own options and those that all share."""
        reduction = Option(
            self.reduction,
            "how tokens are weighted: " + "; ".join(f"{r} {REDUCTIONS[r]}" for r in self.reductions),
            self.reductions,
        )
        return {**self.options, "reduction": reduction, **SHARED_OPTIONS}

    @property
    def needs(self) -> frozenset[str]:
        """What the learner must supply under the default options; see ``requires``."""
        return self.requires(self.defaults)

    def requires(self, options: Options) -> frozenset[str]:
        """What the learner must supply under resolved ``options``.

        prox: log-probs of the proximal policy. entropy: with its gradient. capacity: the proximal policy's entropies.
        topk, ref_logp, ref_kl, future: scores of the reference. value: a critic. groups: whole groups in one
        micro-batch. entropy_threshold, log_ratio_mean: numbers over the mini-batch (``Normaliser``).
        """
        masked = options.get("quadrants", 15) != 15
        unused = {
            "topk": options.get("beta") == 0,
            "future": options.get("lam") == 0,
            "capacity": not masked and (options.get("capacity") == "none" or _plain(options)),
        }
        extra = {
            "prox": self.rollout.ratio in ("proximal", "sequence", "behaviour"),
            "entropy": options["entropy_coef"] != 0,
            "ref_logp": options.get("kl_coef", 0) > 0 or options.get("kl_estimator") == "k3",
            "ref_kl": options.get("tau", 0) > 0 and options.get("kl_estimator") == "full",
            "value": bool(options.get("critic")),
            "entropy_threshold": masked,
        }
        needed = {name for name in self.rollout.needs if not unused.get(name)}
        return frozenset(needed | {name for name, wanted in extra.items() if wanted})

    def advantage_for(self, options: Options) -> str:
        """The advantage that the driver computes: with a critic just the reward, of which the learner makes GAE."""
        return "return" if options.get("critic") else self.advantage

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
        self._check_group_size(n, options)
        low, high = options.get("band_low"), options.get("band_high")
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"options.band_low={low:g} is above options.band_high={high:g}: no group's mean reward lies between them. Swap "
                "the two, or leave one out."
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

    def _check_group_size(self, n: int, options: Options) -> None:
        compares = advantages.needs_group(self.advantage_for(options)) or self.offline
        if self.composition != "demonstrations" and compares and n < 2:
            raise ConfigError(
                f"sampling.n={n} with algorithm={self.name!r}: it compares the answers of a group, and a single answer "
                "has nothing to be compared with. Set sampling.n to 2 or more (the papers: 8), or use algorithm=sft."
            )
        if self.composition == "append" and n < 3:
            raise ConfigError(
                f"sampling.n={n} with algorithm={self.name!r}: one of the N answers is the demonstration, and an advantage needs "
                "two sampled ones beside it. Set sampling.n to 3 or more (the paper: 8)."
            )

    def _advantage_in_words(self) -> str:
        group = f"{self.advantage}: {advantages.ADVANTAGES[self.advantage].equation}"
        if "critic" not in self.options:
            return group
        with_critic = "GAE over the critic: A_t = Σ_k (discount·gae_lambda)^k δ_{t+k}"
        if self.options["critic"].default:
            return f"gae: {with_critic}; critic=false: {group}"
        return f"{group}; critic=true: {with_critic}"

    def describe(self) -> dict[str, Any]:
        """The five parts, the equation, the papers and the defaults, as plain data."""
        terms = {"rollouts": self.rollout} | (
            {"teacher": self.teacher} if self.teacher and self.teacher is not self.rollout else {}
        )
        weights = {k: t.weight for k, t in terms.items()}
        if self.teacher_weight and "teacher" in weights:
            weights["teacher"] = self.teacher_weight
        if self.rollout.ratio != "none":
            weights["rollouts"] += " · w (importance weight of old tokens, staleness.correction)"
        return {
            "name": self.name,
            "title": self.title,
            "seed_papers": list(self.seed_papers),
            **({"note": self.note} if self.note else {}),
            "equation": self.equation,
            "trains_on": ("cached answers of the initial policy: " if self.offline else "")
            + COMPOSITIONS[self.composition],
            "keep": KEEPS[self.keep],
            "composition": self.composition,
            "offline": self.offline,
            "uses_gate": self.uses_gate,
            "advantage": self._advantage_in_words(),
            "reference": {k: t.reference for k, t in terms.items()},
            "mask": {k: t.mask for k, t in terms.items()},
            "weight": weights,
            "reduction": f"{self.reduction}: {REDUCTIONS[self.reduction]}",
            "J_per_token": {k: t.equation for k, t in terms.items()},
            "needs": sorted(self.needs),
            "defaults": self.defaults,
            "options": {name: option.help for name, option in self.all_options.items()},
        }


def _plain(options: Options) -> bool:
    """No redistribution of the advantage: kappa = 0."""
    return options.get("capacity") == "weights" and options.get("kappa") == 0
