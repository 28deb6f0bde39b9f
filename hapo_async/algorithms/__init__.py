"""The table of algorithms: each row is a small diff of a neighbour.

An algorithm is an advantage, a term for rollout tokens and one for teacher tokens (each a reference denominator, a
stabilisation mask and a weight, see ``hapo_async.upge``), a reduction, the composition of a group
(``hapo_async.inject``) and the rows it keeps. ``hapo_async.objective`` is what the learner calls on a micro-batch;
``loss`` does the same for a batch that is whole.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from hapo_async.algorithms import hybrid, offline, online
from hapo_async.algorithms.base import Algorithm
from hapo_async.errors import ConfigError
from hapo_async.upge import TokenBatch

__all__ = ["TABLE", "Algorithm", "get", "loss", "names"]

_ROWS = (
    *(
        hybrid.SFT,
        offline.RFT,
        online.PPO,
        online.GRPO,
        online.DR_GRPO,
        online.DAPO,
        online.REINFORCE,
        online.RLOO,
        online.REINFORCE_PP,
        online.CISPO,
        online.GSPO,
        online.PSR,
        online.NSR,
        online.W_REINFORCE,
    ),
    *(
        online.GRPO_KL,
        online.GRPO_KL_ERROR_ONLY,
        hybrid.LUFFY,
        hybrid.SRFT,
        hybrid.HPT,
        hybrid.HPT_OFF_ON,
        hybrid.HPT_MIX_ON,
        hybrid.HAPO,
        online.HINDSIGHT_AWARE_HAPO,
        online.APO,
        hybrid.HAPO_APO,
    ),
    *(
        offline.OFF_RL,
        offline.SIMPER,
        offline.FPA,
        offline.DPO,
        offline.RPO,
        offline.KTO,
        offline.A_STAR_PO,
        offline.OFF_RL_KL,
    ),
)
TABLE: dict[str, Algorithm] = {row.name: row for row in _ROWS}


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

    options: the algorithm's own (``get(name).defaults``); ``correction`` (default off), a name of
    ``hapo_async.corrections`` with its options ``cap``, ``floor``, ``decay``, ``veto``, ``tau``, ``prox``; and ``moved``
    (default 0), for prox="loglinear": optimizer updates made since the step began, over the updates of a step. decay and
    a loglinear prox read age [N]. Returns a scalar whose gradient is the algorithm's, and numbers; ``stats["value"]`` is
    -J.

    What a run's driver would have done before is made up for: where advantage is missing, and always for offline
    algorithms with reward [sequences], it is computed from the rewards of each group; rows that the algorithm does not
    keep are left out; ``confidence`` and ``group_size`` are counted where missing (confidence from reward: S rollouts
    with R = 1, in a group that is whole after injection). Raises ConfigError for a bad name or option, ValueError for a
    bad batch.
    """
    from hapo_async.algorithms import whole  # late: it is made of the advantages, which know this table

    return whole.loss(get(name), batch, options)
