"""Rewards of your own: ``module:function``, in this project's, verl's or TRL's signature.

The signature is told from the parameters' names:

- ours: ``verify(prompt, response, truth) -> float | None``
- verl: ``compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict`` (``score`` and
  further numbers, which become components)
- TRL: ``reward(completions, prompts=None, **columns) -> list[float | None]``; called with one completion, as text; the
  truth is passed as ``answer``, ``solution``, ``ground_truth`` and ``truth``.

None means that the function chose not to judge: the answer is masked (verdict ``crash``, fault ``plugin``) and counted. An
exception or a number that is not finite is a failure, and ``verify.attribution`` finds out whose. Reward >= 1 is verdict
``correct``. A module that needs more than 4 GiB beyond what it holds after its import says so: ``WORKER_MEMORY_BYTES``
(None for no limit: a model on a GPU maps more than there is).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hapo_async.errors import ConfigError
from hapo_async.types import SUCCESS, Verdict

Adapter = Callable[[str, str, Any, Mapping[str, Any]], Any]
_TRUTH_COLUMNS = ("answer", "solution", "ground_truth", "truth")


class Abstained(Exception):
    """The function returned None."""

    def __init__(self, components: Mapping[str, float]) -> None:
        super().__init__("the verifier returned None: no judgement")
        self.components = components


@functools.cache
def load(name: str) -> Adapter:
    """Imports a plug-in (the current folder counts) and wraps it as ``(prompt, response, truth, extra) -> result``.

    Raises ConfigError when the module or function is missing or its signature is none of the three.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"verifier {name!r} is not of the form module:function, such as my_rewards:verify.")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"verifier {name!r}: no module named {error.name!r}. Run from the folder that holds it, or install it."
        ) from None
    except Exception as error:
        raise ConfigError(
            f"verifier {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"verifier {name!r}: module {module_name} has no function {function_name!r}.")
    return adapt(function, name)


def memory_bytes(name: str, otherwise: int) -> int | None:
    """What the plug-in's module asks for beyond its import, ``WORKER_MEMORY_BYTES`` (None: no limit), where it says so."""
    module = sys.modules.get(name.partition(":")[0])
    asked = getattr(module, "WORKER_MEMORY_BYTES", otherwise)
    return None if asked is None else int(asked)


def adapt(function: Callable[..., Any], name: str) -> Adapter:
    """Tells the signature from the parameters' names. Raises ConfigError for one that is none of the three."""
    parameters = inspect.signature(function).parameters
    names = set(parameters)
    if {"solution_str", "ground_truth"} <= names:
        return functools.partial(_call_verl, function, names)
    if "completions" in names:
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return functools.partial(_call_trl, function, None if takes_all else names)
    if {"prompt", "response", "truth"} <= names:
        return functools.partial(_call_named, function)
    required = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 3:
        return functools.partial(_call_positional, function)
    raise ConfigError(
        f"verifier {name!r} takes ({', '.join(parameters)}). It must be verify(prompt, response, truth), verl's "
        "compute_score(data_source, solution_str, ground_truth, extra_info) or TRL's reward(completions, **columns)."
    )


def judge(
    name: str, prompt: str, response: str, truth: Any, extra: Mapping[str, Any]
) -> tuple[float, Verdict, Mapping[str, float], str]:
    """(reward, verdict, components, detail). Raises Abstained for None, ValueError for what is no reward; exceptions of the
    plug-in pass through."""
    result = load(name)(prompt, response, truth, extra)
    components: dict[str, float] = {}
    if isinstance(result, Mapping):
        components = {str(k): float(v) for k, v in result.items() if isinstance(v, int | float)}
        result = result.get("score", result.get("reward"))
    if result is None:
        raise Abstained(components)
    reward = float(result)
    if not math.isfinite(reward):
        raise ValueError(f"the verifier returned {reward}: not a reward")
    return reward, Verdict.CORRECT if reward >= SUCCESS else Verdict.WRONG, components, ""


def _call_named(function: Callable[..., Any], prompt: str, response: str, truth: Any, extra: Mapping[str, Any]) -> Any:
    return function(prompt=prompt, response=response, truth=truth)


def _call_positional(
    function: Callable[..., Any], prompt: str, response: str, truth: Any, extra: Mapping[str, Any]
) -> Any:
    return function(prompt, response, truth)


def _call_verl(
    function: Callable[..., Any], names: set[str], prompt: str, response: str, truth: Any, extra: Mapping[str, Any]
) -> Any:
    offered = {
        "data_source": extra.get("data_source", ""),
        "solution_str": response,
        "ground_truth": truth,
        "extra_info": extra.get("extra_info"),
    }
    return function(**{key: value for key, value in offered.items() if key in names})


def _call_trl(
    function: Callable[..., Any],
    names: set[str] | None,
    prompt: str,
    response: str,
    truth: Any,
    extra: Mapping[str, Any],
) -> Any:
    columns: dict[str, Any] = {key: [value] for key, value in extra.items()}
    columns |= {key: [truth] for key in _TRUTH_COLUMNS}
    columns |= {"prompts": [prompt], "completions": [response], "completion_ids": [[]]}
    result = function(**{key: value for key, value in columns.items() if names is None or key in names})
    if not isinstance(result, list | tuple) or len(result) != 1:
        raise TypeError(f"a TRL reward returns one number per completion; got {result!r} for one completion")
    return result[0]
