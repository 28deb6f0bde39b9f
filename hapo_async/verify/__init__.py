"""Judging answers: one name, one response, one truth, one Judgement.

``judge_text`` is pure and runs in the calling process without any deadline; a run uses it only inside the worker
processes of ``verify.pool``, which are killed when they take too long. Nothing here loads sympy before a judgement
needs it.

Verifier names: ``boxed`` (exact match on the last ``\\boxed{}``), ``math`` and ``auto`` (one final answer, mathematically
equal: strict, see ``verify.math``), ``module:function`` (a plug-in, see ``verify.plugin``). The first three read the last
4,096 characters of a response.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from typing import Any

from hapo_async.errors import ConfigError
from hapo_async.types import Fault, Judgement, Verdict
from hapo_async.verify import boxed, final, math, plugin
from hapo_async.verify import truth as truths

BUILTIN = ("auto", "boxed", "math")


def resolve(name: str) -> None:
    """Checks a verifier name before anything is started.

    Raises ConfigError for an unknown name (with the nearest) and for a plug-in that cannot be imported or called.
    """
    if name in BUILTIN:
        return
    if ":" in name:
        plugin.load(name)
        return
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"verifier {name!r} is unknown.{hint} Use {', '.join(BUILTIN)}, or module:function for one of your own."
    )


def judge_text(
    name: str, prompt_text: str, response: str, truth: Any, extra: Mapping[str, Any] | None = None
) -> Judgement:
    """Judges one response.

    truth: str, int, float, or a list of acceptable ones; plug-ins get it as it is, and ``extra`` (further columns of
    the data) with it. An exception becomes verdict ``crash`` (``oom`` for MemoryError), never a reward.
    Raises ConfigError for an unknown name.
    """
    start = time.perf_counter()
    fault = Fault.NONE
    try:
        reward, verdict, components, detail = _judge(name, prompt_text, response, truth, extra or {})
    except ConfigError:
        raise
    except truths.Poisoned as error:
        reward, verdict, components, detail, fault = None, Verdict.CRASH, {}, f"poisoned prompt: {error}", Fault.PROMPT
    except plugin.Abstained as error:
        reward, verdict, components, detail, fault = None, Verdict.CRASH, error.components, str(error), Fault.PLUGIN
    except MemoryError:
        reward, verdict, components, detail = None, Verdict.OOM, {}, "MemoryError"
    except Exception as error:  # the judge failed, not the answer: a verdict of its own
        reward, verdict, components, detail = None, Verdict.CRASH, {}, f"{type(error).__name__}: {error}"[:500]
    return Judgement(verdict, reward, components, time.perf_counter() - start, detail, fault)


def _judge(
    name: str, prompt_text: str, response: str, truth: Any, extra: Mapping[str, Any]
) -> tuple[float | None, Verdict, Mapping[str, float], str]:
    if name not in BUILTIN:
        resolve(name)
        return plugin.judge(name, prompt_text, response, truth, extra)
    if name == "boxed":
        verdict, detail = boxed.verdict(response[-final.TAIL :], truths.check(truth)), ""
    else:
        verdict, detail = math.judge(response, truth, prompt_text)
    return float(verdict is Verdict.CORRECT), verdict, {}, detail


def is_plugin(name: str) -> bool:
    return name not in BUILTIN
