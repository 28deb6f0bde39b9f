"""Keys of the configuration whose value is a small table of its own, such as ``learner.adamw``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from hapo_async.options import Option

ADAMW = {
    "betas": Option([0.9, 0.95], "decay of the two moments"),
    "eps": Option(1e-8, "added to the root of the second moment", low=0.0, low_open=True),
    "weight_decay": Option(0.0, "decoupled weight decay", low=0.0),
}
ALARMS = {
    "silence_s": Option(30.0, "seconds without progress after which an actor is named", low=0.0, low_open=True),
    "canary_every": Option(10, "steps between comparisons of generators and learner; 0 is never", low=0),
    "mismatch_kl": Option(
        0.01, "KL between generator and learner at equal weights above which it is an alarm", low=0.0
    ),
}
LORA = {
    "rank": Option(8, "columns of A and B", low=1),
    "alpha": Option(16.0, "the update is alpha / rank times B A", low=0.0, low_open=True),
    "targets": Option("auto", "names of the linear layers that get one; auto: all but the head"),
    "dropout": Option(0.0, "share of the adapter's inputs that are dropped", low=0.0, high=1.0, high_open=True),
}
EVAL_SAMPLING = {
    "temperature": Option(0.0, "0 is greedy", low=0.0),
    "top_p": Option(1.0, "nucleus sampling", low=0.0, low_open=True, high=1.0),
    "max_tokens": Option(0, "longest answer; 0 is sampling.max_tokens", low=0),
}
TABLES = {"run.alarms": ALARMS, "learner.adamw": ADAMW, "learner.lora": LORA, "eval.sampling": EVAL_SAMPLING}
"""Each table by its key."""


def complete(known: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The table with its defaults. Raises ValueError with the rule and the fix."""
    out: dict[str, Any] = {}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{key!r} is none of its keys.{hint} They are {', '.join(known)}")
    for key, option in known.items():
        value = given.get(key, option.default)
        if isinstance(option.default, list):
            out[key] = _betas(key, value)
        elif isinstance(option.default, str):
            out[key] = _names(key, value, option.default)
        elif option.accepts(value):
            out[key] = option.convert(value)
        else:
            raise ValueError(f"{key}={value!r} must be {option.rule}: {option.help}")
    return out


def _betas(key: str, value: Any) -> list[float]:
    numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) and 0 <= x < 1 for x in value)
    if not numbers or len(value) != 2:
        raise ValueError(f"{key}={value!r} must be two numbers from 0 to below 1, such as [0.9, 0.95]")
    return [float(x) for x in value]


def _names(key: str, value: Any, word: str) -> str | list[str]:
    """The word itself, or a list of names."""
    if value == word:
        return word
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x for x in value):
        raise ValueError(f"{key}={value!r} must be {word} or a list of names, such as [q_proj, v_proj]")
    return list(value)
