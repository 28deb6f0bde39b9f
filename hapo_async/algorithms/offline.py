"""Algorithms that learn from answers which the initial policy gave once, judged and kept: FPA and its baselines."""

from __future__ import annotations

from dataclasses import replace

from hapo_async import preference, terms
from hapo_async.algorithms.base import Algorithm
from hapo_async.options import Option

OFFLINE_OPTIONS = {
    "holdout": Option(0.05, "share of the prompts held out for early stopping", low=0, high=0.5),
    "patience": Option(0, "evaluations without a better held-out loss before the run stops; 0: never", low=0),
}
PAIR_OPTIONS = {
    "pairs": Option(
        "zip", "right and wrong answers of a prompt meet: in order, each with each, or once", ("zip", "all", "one")
    )
} | OFFLINE_OPTIONS
BETA = {"beta": Option(0.1, "β of Δ", low=0, low_open=True, aliases=("β",))}

OFF_RL = Algorithm(
    name="off_rl",
    title="Off-RL: likelihood of right answers up, of wrong ones down",
    seed_papers=("003",),
    equation="J = reduce[ R·exp(mean_t ℓ) ], R = ±1",
    composition="rollouts",
    advantage="reinforce",
    rollout=preference.OFF_RL,
    reduction="SM",
    offline=True,
    keep="judged",
    options=OFFLINE_OPTIONS,
)
SIMPER = replace(
    OFF_RL,
    name="simper",
    title="SimPER: inverse perplexities of a pair",
    equation="J = reduce[ exp(mean_t ℓ_w) − exp(mean_t ℓ_l) ]",
    rollout=preference.SIMPER,
    reduction="PAIRS",
    reductions=("PAIRS",),
    keep="paired",
    options=PAIR_OPTIONS,
)
FPA = replace(
    OFF_RL,
    name="fpa",
    title="FPA: Off-RL with the weights of an extrapolated future policy",
    equation=f"J = reduce[ {preference.FPA.equation} ], R = ±1",
    rollout=preference.FPA,
    options={
        "lam": Option(
            1.0,
            "λ: how far the policy is extrapolated away from the reference; 0 is Off-RL",
            low=0,
            aliases=("lambda", "λ"),
        ),
        "apply_to": Option(
            "both", "answers with the extrapolated weight; the others keep Off-RL's", ("both", "correct", "incorrect")
        ),
    }
    | OFFLINE_OPTIONS,
)
DPO = replace(
    SIMPER,
    name="dpo",
    title="Direct Preference Optimization",
    equation="J = reduce[ log σ(β(Δ_w − Δ_l)) ], Δ = Σ_t(ℓ − ℓr)",
    rollout=preference.DPO,
    options=BETA | PAIR_OPTIONS,
)
RPO = replace(
    DPO,
    name="rpo",
    title="RPO: DPO with the likelihood of the winners",
    equation="J = reduce[ log σ(β(Δ_w − Δ_l)) + α·mean_t ℓ_w ]",
    rollout=preference.RPO,
    options=DPO.options | {"alpha": Option(1.0, "α: weight of the winners' mean log-prob", low=0, aliases=("α",))},
)
KTO = replace(
    OFF_RL,
    name="kto",
    title="Kahneman-Tversky Optimization",
    equation="J = reduce[ λ_y·σ(±β(Δ − z0)) − λ_y ], z0 = mean Δ over the mini-batch",
    rollout=preference.KTO,
    reduction="SEQ",
    reductions=("SEQ",),
    options=BETA
    | {
        "lam_correct": Option(1.0, "λ_y of right answers", low=0),
        "lam_incorrect": Option(1.0, "λ_y of wrong answers", low=0),
        "clamp0": Option(False, "z0 not below 0, as in the paper of KTO"),
    }
    | OFFLINE_OPTIONS,
)
A_STAR_PO = replace(
    KTO,
    name="a_star_po",
    title="A*-PO: regression on the optimal advantage",
    equation="J = −reduce[ (β₂Δ − (r − V*))² ], V* = β₁·log mean e^{r/β₁}",
    advantage="a_star_po",
    rollout=preference.A_STAR_PO,
    options={
        "beta1": Option(0.5, "β₁ of V*", low=0, low_open=True),
        "beta2": Option(1e-3, "β₂ of Δ", low=0, low_open=True),
        "rewards": Option("signed", "r: signed (±1) or binary (0, 1); not equivalent", ("signed", "binary")),
    }
    | OFFLINE_OPTIONS,
)
OFF_RL_KL = replace(
    OFF_RL,
    name="off_rl_kl",
    title="Off-RL with a forward KL",
    equation="J = reduce[ R·exp(mean_t ℓ) − τ·KL(ref‖θ) ], R = ±1",
    options={
        "tau": Option(0.04, "τ: coefficient of KL(ref‖θ)", low=0, aliases=("τ",)),
        "kl_estimator": Option("full", "over the whole vocabulary, or k3 from the sampled tokens", ("full", "k3")),
    }
    | OFFLINE_OPTIONS,
)
RFT = replace(
    OFF_RL,
    name="rft",
    title="Rejection-sampling fine-tuning: the likelihood of right answers",
    equation="J = reduce[ ℓ ] over right answers",
    advantage="psr",
    rollout=terms.LIKELIHOOD,
    reduction="TM",
    keep="nonzero",
)
