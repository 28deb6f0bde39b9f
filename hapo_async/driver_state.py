"""What driver.json of a checkpoint holds, checked before a run goes on from it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hapo_async.ledger import Place


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Cursor(_Part):
    """See ``PromptStream.cursor``."""

    epoch: int = Field(ge=0)
    position: int = Field(ge=0)
    seed: int
    shuffle: bool
    prompts: int = Field(ge=1)
    digest: str


class LedgerState(_Part):
    """See ``Ledger.state_dict``: epoch, uid, place, attempt, detail and tries of each prompt."""

    entries: list[tuple[int, str, Place, int, str, dict[str, int]]]
    dropped_reasons: dict[str, int]


class DriverState(_Part):
    """The keys that a resume needs; others are passed on as they are."""

    step: int = Field(ge=0)
    incarnation: int = Field(ge=0)
    cursor: Cursor
    ledger: LedgerState
    gate: dict[str, tuple[int, float, float, float, float]] = {}
    config_digest: str
    offline: dict[str, Any] = {}


def problem(text: bytes, step: int) -> str | None:
    """What is wrong with the bytes of a driver.json, or None. step: the one that its folder is named after."""
    try:
        state = DriverState.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "driver.json"
        return f"driver.json: {where}: {first['msg']}"
    return None if state.step == step else f"driver.json is of step {state.step}"
