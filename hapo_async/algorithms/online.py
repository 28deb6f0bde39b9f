"""Algorithms that learn from sampled answers alone: the GRPO and PPO family, APO, Hindsight-Aware HAPO."""

from __future__ import annotations

from dataclasses import replace

from hapo_async import terms
from hapo_async.algorithms.base import Algorithm
from hapo_async.options import Option

KL_OPTIONS = {
    "kl_coef": Option(0.0, "coefficient of the KL to the reference, subtracted from J with the same reduction", low=0),
    "kl": Option(
        "k3",
        "estimate of KL(θ‖ref): k3 = e^{ℓr−ℓ} − (ℓr−ℓ) − 1; k2 = (ℓ−ℓr)²/2, the exact gradient; k1 = ℓ−ℓr with k2's gradient",
        ("k3", "k2", "k1"),
    ),
    "kl_where": Option("all", "all rollout tokens, or errors: those with A < 0", ("all", "errors")),
}
CLIP_OPTIONS = {
    "clip": Option(True, "clip the ratio; false lets every rollout token train"),
    "eps": Option(0.2, "ratio clip ε", low=0, high=1, aliases=("epsilon", "ε", "eps_low")),
    "eps_high": Option(None, "upper clip; null: the same as eps", low=0, kind=float),
}
STD = {"std": Option(True, "divide the advantage by the group's std")}
GROUP_OPTIONS = {
    "filter": Option(
        "none",
        "zero_variance: groups whose answers are all right or all wrong are dropped and other prompts sampled",
        ("none", "zero_variance"),
    ),
    "band_low": Option(
        None,
        "groups whose mean reward is lower are dropped and other prompts sampled; null: no bound",
        kind=float,
    ),
    "band_high": Option(None, "the same for groups whose mean reward is higher; null: no bound", kind=float),
    "overlong": Option(
        0.0,
        "share of the longest length over which a penalty falls from 0 to -1, added to the reward of the advantage",
        low=0,
        high=1,
    ),
}
RATIO_OPTIONS = CLIP_OPTIONS | STD | GROUP_OPTIONS | KL_OPTIONS
CRITIC_OPTIONS = {
    "critic": Option(False, "advantage from a critic by GAE; false: from the group"),
    "discount": Option(1.0, "discount of GAE", low=0, high=1),
    "gae_lambda": Option(1.0, "λ of GAE", low=0, high=1),
    "value_clip": Option(0.2, "how far a value may move in a step before its gradient stops", low=0),
    "value_coef": Option(0.5, "coefficient of the critic's squared error", low=0),
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
HINDSIGHT_OPTIONS = {
    "capacity": Option(
        "weights",
        "how entropy redistributes A: weights (A·w) | entropy_advantage (A + min(α·H, |A|/κ_e)) | none",
        ("weights", "entropy_advantage", "none"),
    ),
    "kappa": Option(0.5, "κ of w = (1−κ) + κ·C_t/mean C; 0 is GRPO", low=0, high=1, aliases=("κ",)),
    "alpha": Option(0.4, "α of entropy_advantage", low=0, aliases=("α",)),
    "kappa_e": Option(2.0, "κ_e of entropy_advantage", low=1, low_open=True),
    "quadrants": Option(
        15,
        "which of sign(A') × (H ≥ quantile) train, as a sum: 1 positive high, 2 positive low, 4 negative high, 8 negative "
        "low; 5 is the top-entropy mask",
        low=0,
        high=15,
    ),
    "quantile": Option(0.8, "quantile q of the mini-batch's token entropies that parts high from low", low=0, high=1),
}

GRPO = Algorithm(
    name="grpo",
    title="Group Relative Policy Optimization",
    seed_papers=("000", "002", "003", "004"),
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ], ρ = exp(ℓ − ℓp)",
    composition="rollouts",
    advantage="grpo",
    rollout=terms.CLIPPED,
    reduction="TM",
    options=RATIO_OPTIONS,
)
PPO = replace(
    GRPO,
    name="ppo",
    title="Proximal Policy Optimization",
    seed_papers=("002", "004"),
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) − value_coef·max((V−G)², (clip(V, V_old±value_clip)−G)²) ], "
    "A from GAE over the critic V with returns G",
    advantage="dr_grpo",
    options=RATIO_OPTIONS
    | {"std": replace(STD["std"], default=False)}
    | CRITIC_OPTIONS
    | {"critic": replace(CRITIC_OPTIONS["critic"], default=True)},
)
DR_GRPO = replace(
    GRPO,
    name="dr_grpo",
    title="Dr.GRPO: GRPO without the std, divided by a constant length",
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ], A = R − mean, Σ_t divided by the constant L_max",
    seed_papers=("002",),
    advantage="dr_grpo",
    reduction="SN",
    options=RATIO_OPTIONS | {"std": replace(STD["std"], default=False)},
)
DAPO = replace(
    GRPO,
    name="dapo",
    title="DAPO: higher upper clip, dynamic sampling, over-long penalty",
    seed_papers=("004",),
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε_high)·A) ] over groups that are neither all right nor all wrong",
    options=RATIO_OPTIONS
    | {
        "eps_high": replace(CLIP_OPTIONS["eps_high"], default=0.28),
        "filter": replace(GROUP_OPTIONS["filter"], default="zero_variance"),
        "overlong": replace(GROUP_OPTIONS["overlong"], default=0.2),
    },
)
REINFORCE = replace(
    GRPO,
    name="reinforce",
    title="REINFORCE with rewards of ±1",
    seed_papers=("002",),
    equation="J = reduce[ A·ℓ ], A = ±1",
    advantage="reinforce",
    rollout=terms.SCORE,
    reduction="SEQ",
    options=GROUP_OPTIONS | KL_OPTIONS,
)
RLOO = replace(
    REINFORCE,
    name="rloo",
    title="REINFORCE with a leave-one-out baseline",
    equation="J = reduce[ A·ℓ ], A = R − mean of the other answers' R",
    advantage="rloo",
)
REINFORCE_PP = replace(
    GRPO,
    name="reinforce_pp",
    title="REINFORCE++: PPO's clip on returns whitened over the batch",
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ], A = (R − μ)/σ over all tokens of the batch",
    seed_papers=("002",),
    advantage="reinforce_pp",
    options=CLIP_OPTIONS | GROUP_OPTIONS | KL_OPTIONS,
)
CISPO = replace(
    GRPO,
    name="cispo",
    title="CISPO: a bounded importance weight, no token dropped",
    seed_papers=("002",),
    equation="J = reduce[ sg(min(ρ, C))·A·ℓ ]",
    rollout=terms.CISPO,
    options={"c": Option(5.0, "C: upper bound of the ratio", low=0, low_open=True, aliases=("C",))}
    | STD
    | GROUP_OPTIONS
    | KL_OPTIONS,
)
GSPO = replace(
    GRPO,
    name="gspo",
    title="GSPO: one ratio per response",
    seed_papers=("002",),
    equation="J = reduce[ min(sA, clip(s, 1−ε, 1+ε_high)·A) ], s = exp(mean_t(ℓ − ℓp))",
    rollout=terms.GSPO,
    reduction="SM",
    options=RATIO_OPTIONS
    | {
        "eps": replace(CLIP_OPTIONS["eps"], default=3e-4),
        "eps_high": replace(CLIP_OPTIONS["eps_high"], default=4e-4),
    },
)
PSR = replace(
    GRPO,
    name="psr",
    title="Positive sample reinforcement: right answers alone",
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ] over right answers, A = 1",
    seed_papers=("004",),
    advantage="psr",
    keep="nonzero",
    options=CLIP_OPTIONS | GROUP_OPTIONS | KL_OPTIONS,
)
NSR = replace(
    PSR,
    name="nsr",
    title="Negative sample reinforcement: wrong answers alone",
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ] over wrong answers, A = −1",
    advantage="nsr",
)
W_REINFORCE = replace(
    PSR,
    name="w_reinforce",
    title="Weighted-REINFORCE: right answers with weight λ, wrong ones with 1",
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) ], A = λ of right answers, −1 of wrong ones",
    advantage="w_reinforce",
    options=PSR.options | {"lam": Option(0.1, "λ: weight of right answers", low=0, aliases=("lambda", "λ"))},
)
GRPO_KL = replace(
    GRPO,
    name="grpo_kl",
    title="GRPO with a KL to the reference",
    seed_papers=("004",),
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) − kl_coef·KL(θ‖ref) ]",
    options=RATIO_OPTIONS | {"kl_coef": replace(KL_OPTIONS["kl_coef"], default=0.01)},
)
GRPO_KL_ERROR_ONLY = replace(
    GRPO_KL,
    name="grpo_kl_error_only",
    title="GRPO with the KL on failures alone",
    equation="J = reduce[ min(ρA, clip(ρ, 1−ε, 1+ε)·A) − [A < 0]·kl_coef·KL(θ‖ref) ]",
    options=GRPO_KL.options | {"kl_where": replace(KL_OPTIONS["kl_where"], default="errors")},
)
HINDSIGHT_AWARE_HAPO = replace(
    GRPO,
    name="hindsight_aware_hapo",
    title="Hindsight-Aware HAPO: signed capacity (our reconstruction)",
    seed_papers=("001",),
    equation="J = reduce[ min(ρA', clip(ρ, 1−ε, 1+ε)·A') ], A'_t = A·w_t, w ∝ clip((1−κ) + κ·C_t/mean C, .1, 5) "
    "with mean 1 per response",
    rollout=terms.HINDSIGHT,
    options=RATIO_OPTIONS | HINDSIGHT_OPTIONS,
    note="our reconstruction: only the paper's abstract is public",
)
APO = replace(
    GRPO,
    name="apo",
    title="APO: Anchored Policy Optimization",
    seed_papers=("004",),
    equation=f"J = reduce[ {terms.ANCHORED.equation} ]",
    rollout=terms.ANCHORED,
    options=RATIO_OPTIONS | ANCHOR_OPTIONS | CRITIC_OPTIONS,
)
