"""A second implementation of every algorithm, from the specification alone, in plain Python floats."""

from __future__ import annotations

from tests.oracles.hybrid import HYBRID
from tests.oracles.offline import OFFLINE
from tests.oracles.online import ONLINE
from tests.oracles.plain import Answer, Oracle

ORACLES: dict[str, Oracle] = ONLINE | HYBRID | OFFLINE


def oracle(name: str) -> Oracle:
    """``oracle(name)(batch, **options) -> Answer``: the value -J and the gradient by every input that has one."""
    return ORACLES[name]


__all__ = ["ORACLES", "Answer", "oracle"]
