"""Algorithms that learn from demonstrations, alone or beside sampled answers: SFT, LUFFY, SRFT, HPT, HAPO."""

from __future__ import annotations

from dataclasses import replace

from hapo_async import terms
from hapo_async.algorithms.base import Algorithm
from hapo_async.algorithms.online import ANCHOR_OPTIONS, DR_GRPO, GROUP_OPTIONS, GRPO, KL_OPTIONS, RATIO_OPTIONS, STD
from hapo_async.options import Option

SHAPING_OPTIONS = {
    "teacher_weight": Option(
        "advantage", "what multiplies the teacher's F: its advantage, or one", ("one", "advantage")
    ),
    "shaping": Option("f", "F of teacher tokens: f = π/(π+γ_F), logp = ℓ, identity = π", ("f", "logp", "identity")),
    "shaping_gamma": Option(0.1, "γ_F of f", low=0, low_open=True),
}
SHAPING_ALONE = {name: option for name, option in SHAPING_OPTIONS.items() if name != "teacher_weight"}
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
SWITCH_OPTIONS = {
    "gamma": Option(0, "demonstration iff S <= gamma; -1 never, N always", low=-1, aliases=("γ",)),
    "feedback": Option(
        "switch",
        "weights of rollouts and demonstration by the success rate P: switch (one or the other), linear (P, 1−P), "
        "sigmoid (σ of P − gamma/N)",
        ("switch", "linear", "sigmoid"),
    ),
    "sft_steps": Option(0, "steps at the start that train demonstrations alone (SFT, then RL)", low=0),
}

SFT = Algorithm(
    name="sft",
    title="Supervised fine-tuning on demonstrations",
    seed_papers=("000", "002", "003"),
    equation="J = reduce[ ℓ ]",
    composition="demonstrations",
    advantage="none",
    rollout=terms.LIKELIHOOD,
    teacher=terms.LIKELIHOOD,
    reduction="TM",
)
LUFFY = replace(
    GRPO,
    name="luffy",
    title="LUFFY: off-policy guidance with policy shaping",
    seed_papers=("002",),
    equation="J = reduce[ rollouts: min(ρA, clip(ρ)·A); teacher: A·f(π), f(π) = π/(π+γ_F) ]",
    composition="append",
    teacher=terms.SHAPED,
    teacher_weight="A | 1 (teacher_weight)",
    options=RATIO_OPTIONS | SHAPING_OPTIONS,
)
SRFT = replace(
    LUFFY,
    name="srft",
    title="SRFT: supervised and reinforcement fine-tuning in one stage, weighed by entropy",
    equation="J = reduce[ rollouts: own_coef·e^H·ℓ where correct, −ℓ where wrong; teacher: sft_coef·e^{−H}·ℓ + A·F(π) ]",
    rollout=terms.SRFT_ROLLOUTS,
    teacher=terms.SRFT_TEACHER,
    teacher_weight="",
    options=STD
    | GROUP_OPTIONS
    | KL_OPTIONS
    | SHAPING_ALONE
    | {
        "shaping": replace(SHAPING_OPTIONS["shaping"], default="identity"),
        "sft_coef": Option(0.5, "weight of e^{−H}·ℓ of the demonstration", low=0),
        "own_coef": Option(0.1, "weight of e^H·ℓ of right answers", low=0),
    },
    note="the official code is not public; the reduction is ours",
)
HPT = replace(
    DR_GRPO,
    name="hpt",
    title="Hybrid Post-Training: RL or SFT by the prompt's successes",
    equation="J = mean over prompts[ α·mean over rollouts(Σ_t min(ρA, clip(ρ)·A)/L_max) + β·sft_coef·mean_t ℓ ], "
    "β = 1 − α = [S ≤ γ]",
    composition="switch",
    teacher=terms.SCALED_LIKELIHOOD,
    reduction="PN",
    reductions=("PN",),
    options=DR_GRPO.options | SWITCH_OPTIONS | {"sft_coef": Option(1.0, "weight of the demonstration", low=0)},
)
HPT_OFF_ON = replace(
    HPT,
    name="hpt_off_on",
    title="HPT OFF/ON: LUFFY's off-policy term in the place of SFT",
    equation="J = mean over prompts[ α·mean over rollouts(Σ_t min(ρA, clip(ρ)·A)/L_max) + β·mean_t A·f(π) ], "
    "β = 1 − α = [S ≤ γ], A = 1 of a lone demonstration",
    teacher=terms.WEIGHED_SHAPED,
    options=DR_GRPO.options | SWITCH_OPTIONS | SHAPING_ALONE,
)
HPT_MIX_ON = replace(
    HPT,
    name="hpt_mix_on",
    title="HPT Mix/ON: SFT and LUFFY's off-policy term together",
    equation="J = mean over prompts[ α·mean over rollouts(Σ_t min(ρA, clip(ρ)·A)/L_max) + "
    "β·mean_t(sft_coef·ℓ + off_coef·A·f(π)) ], β = 1 − α = [S ≤ γ], A = 1 of a lone demonstration",
    teacher=terms.MIXED,
    options=DR_GRPO.options
    | SWITCH_OPTIONS
    | SHAPING_ALONE
    | {
        "sft_coef": Option(0.1, "weight of ℓ", low=0),
        "off_coef": Option(1.0, "weight of A·f(π)", low=0),
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
HAPO_APO = replace(
    HAPO,
    name="hapo_apo",
    title="HAPO's gate with APO on the failures that stay",
    seed_papers=("000", "004"),
    equation=f"J = reduce[ rollouts: {terms.ANCHORED.equation}; teacher: F(π_θ, c) ]; the teacher replaces argmin R where "
    "c = (1+S)/(2+N) < γ",
    rollout=terms.ANCHORED,
    options=HAPO.options | ANCHOR_OPTIONS,
)
