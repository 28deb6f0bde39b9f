"""Who pays for a judgement that timed out, ran out of memory or crashed.

    first try ──► failed ──► again, in a fresh worker ──► judged: that counts
                                     │ failed
                                     ▼
                             a benign answer, in a fresh worker ──► failed: the judge's fault, masked
                                     │ judged
                                     ▼
                             this prompt's truth against a benign answer ──► failed: poisoned prompt, masked
                                     │ judged
                                     ▼
                             charged to the answer: reward 0, verdict kept

Charging is what keeps a policy from learning to crash its judge. The built-in verifiers have a fixed benign answer; a
plug-in's is one that it has judged before, in this pool. As long as there is none, the prompt's truth stands in for the
answer, and a failure is the judge's. A charged answer costs two deadlines and two benign judgements.

An exception that a plug-in raises in a worker that lives on is settled the same way; once its type has been charged to
an answer, later ones are tried again in the same worker: a reward function that raises for every unreadable answer must
not cost three processes each time.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hapo_async.types import Fault, Judgement, Verdict
from hapo_async.verify import is_plugin

Item = Sequence[Any]
"""(prompt text, response, truth) or (prompt text, response, truth, further columns for plug-ins)."""

BENIGN = r"\boxed{0}"
CANARY: Item = ("", r"\boxed{x+1}", "1+x")
_MOST_POISONED = 1024
_LONGEST_WITNESS = 1 << 16  # characters


def failed(judgement: Judgement) -> bool:
    """Whether somebody has to pay who is not known yet."""
    return not judgement.is_judged and judgement.fault is Fault.NONE


class Attribution:
    """What a pool knows of benign answers, poisoned prompts and exceptions. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._plugin = is_plugin(name)
        self._witness: Item | None = None if self._plugin else CANARY
        self._poisoned: OrderedDict[str, str] = OrderedDict()
        self._charged: set[str] = set()
        self._lock = threading.Lock()

    def saw(self, item: Item, judgement: Judgement) -> None:
        """Keeps the first answer that a plug-in has judged."""
        good = judgement.is_judged and judgement.fault is Fault.NONE
        if self._witness is None and good and len(str(item[1])) <= _LONGEST_WITNESS:
            self._witness = item

    def known(self, item: Item) -> Judgement | None:
        """The judgement on an answer whose prompt is poisoned, for nothing."""
        if not self._poisoned:
            return None
        with self._lock:
            detail = self._poisoned.get(_key(item))
        return None if detail is None else Judgement(Verdict.CRASH, None, {}, 0.0, detail, Fault.PROMPT)

    def settle(
        self, item: Item, first: Judgement, judge: Callable[[Item, bool], Judgement], in_band: bool = False
    ) -> Judgement:
        """first: how judging ``item`` failed; in_band: its worker lives on. judge(item, fresh): judges one item, in a
        worker that has judged nothing yet where ``fresh``; it raises only what ends the pool."""
        kind = first.detail.partition(":")[0]
        fresh = not (in_band and kind in self._charged)
        second = judge(item, fresh)
        seconds = first.seconds + second.seconds
        if not failed(second):
            return replace(second, seconds=seconds)
        witness = self._witness
        benign = witness or (item[0], str(item[2]), *item[2:])
        canary = judge(benign, fresh)
        if not canary.is_judged or (not self._plugin and canary.verdict is not Verdict.CORRECT):
            why = f"{second.detail}; a benign answer fails as well ({canary.verdict}: {canary.detail}): the judge is to blame"
            return Judgement(second.verdict, None, {}, seconds, why[:800], Fault.JUDGE)
        if witness is not None:
            own = judge((item[0], witness[1] if self._plugin else BENIGN, *item[2:]), False)
            if failed(own) or own.fault is Fault.PROMPT:
                return self._poison(item, second, own, seconds)
        if in_band:
            self._charged.add(kind)
        why = f"{second.detail}, twice; a benign answer is judged: charged to the answer"
        return Judgement(second.verdict, 0.0, {}, seconds, why[:800], Fault.ANSWER)

    def _poison(self, item: Item, second: Judgement, own: Judgement, seconds: float) -> Judgement:
        detail = f"poisoned prompt: its truth fails a benign answer as well ({own.verdict}: {own.detail})"[:800]
        with self._lock:
            self._poisoned[_key(item)] = detail
            while len(self._poisoned) > _MOST_POISONED:
                self._poisoned.popitem(last=False)
        return Judgement(second.verdict, None, {}, seconds, detail, Fault.PROMPT)


def _key(item: Item) -> str:
    """Names a prompt and its truth."""
    text = json.dumps([item[0], *item[2:]], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
