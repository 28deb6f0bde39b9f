"""Algorithms with options: the defaults of each, every option that the loss reads, every correction."""

from __future__ import annotations

from typing import Any

from tests.oracles import ORACLES

RATIO = (
    "grpo",
    "dr_grpo",
    "dapo",
    "reinforce_pp",
    "psr",
    "gspo",
    "cispo",
    "reinforce",
    "rloo",
    "grpo_kl",
    "apo",
    "luffy",
)
RATIO += ("hapo", "hapo_apo", "hpt", "hpt_mix_on", "hindsight_aware_hapo")

CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in sorted(ORACLES)] + [
    *[(name, {"correction": c}) for name in RATIO for c in ("tis", "clip")],
    *[(name, {"correction": "tis", "cap": 1.1}) for name in ("grpo", "gspo", "reinforce", "cispo", "hapo_apo")],
    *[
        (name, {"reduction": r})
        for name in ("sft", "grpo", "gspo", "luffy", "hapo", "apo")
        for r in ("SM", "SEQ", "SN")
    ],
    *[(name, {"reduction": r}) for name in ("off_rl", "fpa", "rft", "reinforce", "srft") for r in ("TM", "SN")],
    *[(name, {"entropy_coef": 0.03}) for name in ("grpo", "sft", "hpt", "hapo", "gspo", "srft", "off_rl")],
    *[(name, {"kl_coef": 0.2, "kl": kl}) for name in ("grpo", "reinforce", "hapo", "hpt") for kl in ("k3", "k2", "k1")],
    *[(name, {"clip": False}) for name in ("grpo", "apo", "luffy", "gspo", "hpt", "hindsight_aware_hapo")],
    ("ppo", {"critic": False}),
    ("ppo", {"value_clip": 0.05, "value_coef": 0.1}),
    ("apo", {"critic": True}),
    ("grpo", {"eps": 0.1, "eps_high": 0.5}),
    ("grpo", {"kl_coef": 0.2, "kl_where": "errors"}),
    ("dr_grpo", {"l_max": 7.0}),
    ("cispo", {"c": 1.2}),
    ("luffy", {"clip": False, "reduction": "SN", "l_max": 8192.0, "entropy_coef": 0.001}),
    ("luffy", {"shaping_gamma": 0.3, "teacher_weight": "one"}),
    ("srft", {"shaping": "f", "sft_coef": 0.2, "own_coef": 0.3}),
    ("hpt", {"sft_coef": 0.3, "l_max": 5.0}),
    ("hpt_off_on", {"shaping_gamma": 0.3}),
    ("hpt_mix_on", {"sft_coef": 0.3, "off_coef": 0.4, "shaping": "identity"}),
    ("hapo", {"shaping": "logp"}),
    ("hapo", {"shaping": "identity"}),
    ("hapo", {"shaping_gamma": 0.02, "teacher_weight": "advantage"}),
    ("hapo", {"confidence": "1-c"}),
    ("hapo", {"confidence": "1-c/gamma", "gamma": 0.5, "teacher_weight": "advantage"}),
    ("hapo", {"normaliser": "separate", "entropy_coef": 0.05}),
    *[("hindsight_aware_hapo", {"kappa": k}) for k in (0.0, 0.9, 1.0)],
    *[("hindsight_aware_hapo", {"quadrants": q, "quantile": 0.6}) for q in range(16)],
    ("hindsight_aware_hapo", {"capacity": "entropy_advantage"}),
    ("hindsight_aware_hapo", {"capacity": "none", "quadrants": 5}),
    ("apo", {"anchor_clip": "push_only"}),
    ("apo", {"beta": 0.7, "lam": 1.3}),
    ("apo", {"beta": 0.7, "r_anchor_max": 0.8}),
    ("apo", {"beta": 0.0, "lam": 1.2, "eps_high": 0.1}),
    ("hapo_apo", {"anchor_clip": "push_only", "confidence": "1-c", "correction": "tis"}),
    *[("fpa", {"apply_to": side}) for side in ("correct", "incorrect")],
    ("fpa", {"lam": 0.0}),
    *[(name, {"pairs": how}) for name in ("dpo", "rpo", "simper") for how in ("all", "one")],
    ("dpo", {"beta": 2.0}),
    ("rpo", {"alpha": 0.3, "beta": 0.5}),
    ("kto", {"clamp0": True, "beta": 0.5}),
    ("kto", {"lam_correct": 1.5, "lam_incorrect": 0.5}),
    ("a_star_po", {"rewards": "binary"}),
    ("a_star_po", {"beta1": 2.0, "beta2": 0.3}),
    ("off_rl_kl", {"tau": 0.5}),
    ("off_rl_kl", {"kl_estimator": "k3"}),
]
