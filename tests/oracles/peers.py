"""verl's and TRL's own loss functions on the same batches: unbound, with the least that they look at around them.

They live in .venv/peers (requirements/test.txt), which only this file puts on the path, at its end: nothing in the
package may be able to import them. Importing starts nothing: no Ray, no accelerator, no logger.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.oracles.offline import answers
from tests.oracles.offline import pairs as pairs_of
from tests.oracles.plain import Answer, Plain, Sequence

FOLDER = Path(sys.prefix) / "peers"


def load(name: str) -> Any:
    """A peer's module. Where the peer is not installed the test is skipped, except in the test set-up (CI is set)."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec(name.partition(".")[0]) is None and "CI" not in os.environ:
        import pytest

        pytest.skip(f"{name} is not installed (requirements/test.txt)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not name.startswith("trl"):
            return importlib.import_module(name)
        importlib.import_module("trl.import_utils")
        with mock.patch("trl.import_utils.is_vllm_available", return_value=False):  # or it imports all of vLLM
            return importlib.import_module(name)


@dataclass
class Padded:
    """Rows of one batch's tokens, ``[S, T]``, padded on the right; ``logp`` is the leaf ``[N]`` behind them."""

    logp: Tensor
    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, b: Plain, sequences: list[Sequence]) -> Padded:
        width = max(len(s.tokens) for s in sequences)
        index = torch.full((len(sequences), width), b.n)
        for row, s in enumerate(sequences):
            index[row, : len(s.tokens)] = torch.tensor(s.tokens)
        return cls(torch.tensor(b.logp, dtype=torch.float64).requires_grad_(), index, (index < b.n).double())

    def rows(self, values: Any) -> Tensor:
        values = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
        return torch.cat([values, torch.zeros(1, dtype=torch.float64)])[self.index]

    def answer(self, loss: Tensor) -> Answer:
        return Answer(loss.item(), {"logp": torch.autograd.grad(loss, self.logp)[0].tolist()})


def rollouts(b: Plain, nonzero: bool = False) -> list[Sequence]:
    kept = [s for s in b.sequences() if not s.teacher]
    return [s for s in kept if not nonzero or any(b.advantage[i] for i in s.tokens)]


# --------------------------------------------------------------------------------------------------------------- verl


def actor_config(**fields: Any) -> Any:
    """No dual clip (clip_ratio_c is on by default), no global batch."""
    config = load("verl.workers.config").ActorConfig
    return config(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_torch_compile=False,
        **{"clip_ratio_c": 1e9} | fields,
    )  # fmt: skip


def verl_weights(p: Padded, b: Plain, cap: float, level: str = "token") -> Tensor:
    """verl's truncated importance weights."""
    helper = load("verl.trainer.ppo.rollout_corr_helper")
    gap = p.rows([b.prox(i) - b.logp_behave[i] for i in range(b.n)])
    return helper.compute_rollout_correction_weights(gap, p.mask, level, cap)[0]


VERL_REDUCTION = {"TM": "token-mean", "SEQ": "seq-mean-token-sum", "SN": "seq-mean-token-sum-norm"}


def verl_reduce(p: Padded, tokens: Tensor, reduction: str, l_max: float) -> Tensor:
    """``agg_loss``; the mean of token means goes response by response, where it has no 1e-8 in the denominator."""
    agg = load("verl.trainer.ppo.core_algos").agg_loss
    if reduction == "SM":
        each = [agg(t[None], m[None], "token-mean") for t, m in zip(tokens, p.mask, strict=True)]
        return torch.stack(each).mean()
    return agg(tokens, p.mask, VERL_REDUCTION[reduction], loss_scale_factor=l_max)


def verl_policy(name: str, reduction: str, nonzero: bool = False, **config: Any) -> Callable[..., Answer]:
    """A policy loss of verl, response by response, and verl's reduction over them."""

    def run(batch: Any, **o: Any) -> Answer:
        core = load("verl.trainer.ppo.core_algos")
        b = Plain(batch)
        p = Padded.of(b, rollouts(b, nonzero))
        logp, prox = p.rows(p.logp), p.rows([b.prox(i) for i in range(b.n)])
        weights = verl_weights(p, b, o.get("cap", 2.0)) if o.get("correction") == "tis" else None
        how, l_max = o.get("reduction", reduction), o.get("l_max", 1024.0)
        a = p.rows(b.advantage)
        if name == "reinforce":
            loss = core.compute_policy_loss_reinforce(
                prox, logp, a, p.mask, VERL_REDUCTION[how], actor_config(global_batch_info={}), weights
            )[0]
        else:
            policy_loss, settings = core.get_policy_loss_fn(name), actor_config(**config)
            total = lambda row: policy_loss(  # noqa: E731
                prox[row], logp[row], a[row], p.mask[row], loss_agg_mode="token-sum", config=settings,
                rollout_is_weights=None if weights is None else weights[row],
            )[0]  # fmt: skip
            sums = torch.stack([total(slice(r, r + 1)) for r in range(len(logp))])
            loss = verl_sums(p, sums, how, l_max)
        if "kl" in o:
            loss = loss + o["kl_coef"] * verl_kl(p, b, logp, o, how, l_max)
        return p.answer(loss)

    return run


def verl_sums(p: Padded, sums: Tensor, how: str, l_max: float) -> Tensor:
    """Responses' sums reduced by verl's ``agg_loss``: each is spread evenly over its tokens, which keeps its sum."""
    even = (sums / p.mask.sum(-1))[:, None] * p.mask
    return verl_reduce(p, even, how, l_max)


def verl_kl(p: Padded, b: Plain, logp: Tensor, o: dict[str, Any], how: str, l_max: float) -> Tensor:
    core = load("verl.trainer.ppo.core_algos")
    name = "k1+" if o["kl"] == "k1" else o["kl"]  # straight through
    kl = core.kl_penalty(logp, p.rows(b.logp_ref), name)
    if o.get("kl_where") == "errors":
        kl = torch.where(p.rows(b.advantage) < 0, kl, torch.zeros_like(kl))
    return verl_reduce(p, kl, how, l_max)


def verl_value_loss(batch: Any, value_clip: float = 0.2) -> tuple[float, list[float]]:
    """.5 * token mean of the clipped squared error, and its gradient by the critic's values."""
    b = Plain(batch)
    p = Padded.of(b, rollouts(b))
    value = torch.tensor(b.value, dtype=torch.float64).requires_grad_()
    core = load("verl.trainer.ppo.core_algos")
    loss, _ = core.compute_value_loss(p.rows(value), p.rows(b.returns), p.rows(b.value_old), p.mask, value_clip)
    return loss.item(), torch.autograd.grad(loss, value)[0].tolist()


# ---------------------------------------------------------------------------------------------------------------- TRL


def accelerator() -> SimpleNamespace:
    same = lambda x, **_: x  # noqa: E731
    return SimpleNamespace(gather=same, gather_for_metrics=same, reduce=same, num_processes=1, device="cpu")


def trl_grpo(loss_type: str, level: str = "token", nonzero: bool = False, **more: Any) -> Callable[..., Answer]:
    """``GRPOTrainer._compute_loss`` with a model that returns the batch's log-probs."""

    def run(batch: Any, **o: Any) -> Answer:
        trainer = load("trl.trainer.grpo_trainer").GRPOTrainer
        b = Plain(batch)
        p = Padded.of(b, rollouts(b, nonzero))
        o = {"eps": 0.2, "eps_high": 0.2, "kl_coef": 0.0, "l_max": 1024.0} | more | o
        tis = o.get("correction") == "tis"
        this = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (p.rows(p.logp), torch.zeros_like(p.mask), None),
            accelerator=accelerator(), model=SimpleNamespace(training=False), loss_type=loss_type,
            importance_sampling_level=level, epsilon_low=o["eps"], epsilon_high=o["eps_high"], beta=o["kl_coef"],
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            max_completion_length=o["l_max"], top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            use_vllm=tis, vllm_importance_sampling_correction=tis, aux_loss_enabled=False,
            _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
            _metrics={"eval": defaultdict(list)},
        )  # fmt: skip
        inputs = {
            "prompt_ids": torch.zeros(len(p.mask), 1), "prompt_mask": torch.ones(len(p.mask), 1),
            "completion_ids": torch.zeros_like(p.mask), "completion_mask": p.mask,
            "advantages": p.rows(b.advantage), "old_per_token_logps": p.rows([b.prox(i) for i in range(b.n)]),
            "num_items_in_batch": p.mask.sum(),
        }  # fmt: skip
        if b.logp_ref is not None:
            inputs["ref_per_token_logps"] = p.rows(b.logp_ref)
        if tis:
            gap = p.rows([b.prox(i) - b.logp_behave[i] for i in range(b.n)])
            inputs["importance_sampling_ratio"] = gap.exp().clamp(max=o.get("cap", 2.0))
        return p.answer(trainer._compute_loss(this, None, inputs))

    return run


def model_outputs(p: Padded) -> SimpleNamespace:
    zero = torch.zeros_like(p.mask)
    return SimpleNamespace(log_probs=p.rows(p.logp), entropy=zero, mean_logits=zero, is_top1=zero.bool())


def preference_inputs(p: Padded) -> dict[str, Any]:
    """TRL's masks carry the prompt's last position in front of the completion."""
    mask = torch.cat([torch.zeros(len(p.mask), 1, dtype=torch.float64), p.mask], dim=1)
    return {"completion_mask": mask, "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask)}


def trl_dpo(*loss_types: str) -> Callable[..., Answer]:
    """``DPOTrainer._compute_loss``, a pair at a time: TRL's NLL term is a token mean over all winners of its batch."""

    def run(batch: Any, beta: float = 0.1, alpha: float = 1.0, pairs: str = "zip") -> Answer:
        trainer = load("trl.trainer.dpo_trainer").DPOTrainer
        b = Plain(batch)
        found, total = pairs_of(answers(b), pairs), Answer(0.0, {"logp": [0.0] * b.n})
        for winner, loser in found:
            p = Padded.of(b, [winner, loser])
            this = SimpleNamespace(
                accelerator=accelerator(), model=SimpleNamespace(training=False), aux_loss_enabled=False,
                ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
                loss_types=loss_types, loss_weights=[1.0, alpha][: len(loss_types)], use_weighting=False,
                _total_train_tokens=0, _metrics={"eval": defaultdict(list)},
            )  # fmt: skip
            ref = p.rows(b.logp_ref).sum(-1)
            inputs = preference_inputs(p) | {"ref_chosen_logps": ref[:1], "ref_rejected_logps": ref[1:]}
            one = p.answer(trainer._compute_loss(this, lambda p=p, **_: model_outputs(p), inputs, False))
            total.value += one.value / len(found)
            total.grads["logp"] = [
                x + y / len(found) for x, y in zip(total.grads["logp"], one.grads["logp"], strict=True)
            ]
        return total

    return run


def trl_kto(batch: Any, beta: float = 0.1, clamp0: bool = True) -> Answer:
    """``KTOTrainer._compute_loss`` with z0 from the batch's own completions: TRL bounds it below by 0 (``clamp0``)."""
    assert clamp0
    trainer = load("trl.trainer.kto_trainer").KTOTrainer
    b = Plain(batch)
    kept = answers(b)
    p = Padded.of(b, kept)
    ref = p.rows(b.logp_ref).sum(-1)
    scores = iter([p.rows(p.logp).sum(-1).detach()])
    this = SimpleNamespace(
        accelerator=accelerator(), model=SimpleNamespace(training=False), aux_loss_enabled=False,
        _compute_kl_logps=lambda *_: next(scores), calculate_KL=True, precompute_ref_logps=True, loss_type="kto",
        beta=beta, desirable_weight=1.0, undesirable_weight=1.0, _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )  # fmt: skip
    labels = torch.tensor([s.correct for s in kept])
    inputs = preference_inputs(p) | {"label": labels, "ref_logps": ref, "ref_KL_logps": ref}
    return p.answer(trainer._compute_loss(this, lambda **_: model_outputs(p), inputs, False))


# --------------------------------------------------------------------------------------------------------------- which

VANILLA = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
WIDE = VANILLA | {"clip_ratio_high": 0.28}
KL = {"kl": "k3", "kl_coef": 0.01}

Peer = Callable[..., Answer]
# algorithm -> [(what it is called there, the function, the options that both sides get)]
PEERS: dict[str, list[tuple[str, Peer, dict[str, Any]]]] = {
    "ppo": [
        ("verl vanilla", verl_policy("vanilla", "TM", **VANILLA), {"critic": False}),
        ("trl bnpo", trl_grpo("bnpo"), {"critic": False}),
    ],
    "grpo": [
        ("verl vanilla", verl_policy("vanilla", "SM", **VANILLA), {"reduction": "SM"}),
        ("verl vanilla", verl_policy("vanilla", "TM", **VANILLA), {"reduction": "TM", "correction": "tis"}),
        ("trl grpo", trl_grpo("grpo"), {"reduction": "SM"}),
        ("trl grpo", trl_grpo("grpo"), {"reduction": "SM", "correction": "tis"}),
    ],
    "dr_grpo": [
        ("verl vanilla", verl_policy("vanilla", "SN", **VANILLA), {"l_max": 64.0}),
        ("trl dr_grpo", trl_grpo("dr_grpo"), {"l_max": 64.0}),
    ],
    "dapo": [
        ("verl vanilla", verl_policy("vanilla", "TM", **WIDE), {}),
        ("trl dapo", trl_grpo("dapo", eps_high=0.28), {}),
    ],
    "reinforce": [("verl reinforce", verl_policy("reinforce", "SEQ"), {})],
    "rloo": [("verl reinforce", verl_policy("reinforce", "SEQ"), {})],
    "reinforce_pp": [("verl vanilla", verl_policy("vanilla", "TM", **VANILLA), {})],
    "cispo": [
        ("verl cispo", verl_policy("cispo", "TM", clip_ratio=1e9, clip_ratio_low=1e9, clip_ratio_high=4.0), {}),
        ("trl cispo", trl_grpo("cispo", eps_high=5.0), {}),
    ],
    "gspo": [
        ("verl gspo", verl_policy("gspo", "SM", clip_ratio=1, clip_ratio_low=3e-4, clip_ratio_high=4e-4), {}),
        ("trl grpo, sequence level", trl_grpo("grpo", "sequence", eps=3e-4, eps_high=4e-4), {}),
    ],
    **{
        name: [
            ("verl vanilla", verl_policy("vanilla", "TM", nonzero=True, **VANILLA), {}),
            ("trl bnpo", trl_grpo("bnpo", nonzero=True), {}),
        ]
        for name in ("psr", "nsr", "w_reinforce")
    },
    "grpo_kl": [
        *[
            (f"verl vanilla + {kl}", verl_policy("vanilla", "TM", **VANILLA), {"kl": kl, "kl_coef": 0.01})
            for kl in ("k3", "k2", "k1")
        ],
        ("trl bnpo, beta", trl_grpo("bnpo", kl_coef=0.01), {"kl": "k3", "kl_coef": 0.01}),
    ],
    "grpo_kl_error_only": [
        ("verl vanilla + k3", verl_policy("vanilla", "TM", **VANILLA), KL | {"kl_where": "errors"}),
    ],
    "dpo": [("trl sigmoid", trl_dpo("sigmoid"), o) for o in ({}, {"beta": 0.7, "pairs": "all"})],
    "rpo": [("trl sigmoid + sft", trl_dpo("sigmoid", "sft"), o) for o in ({}, {"alpha": 0.3})],
    "kto": [("trl kto", trl_kto, {"clamp0": True, "beta": beta}) for beta in (0.1, 0.6)],
}
