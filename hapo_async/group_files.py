"""Groups that wait for the learner, as files of a checkpoint.

``groups.jsonl`` holds a line per group: header, verdicts, gate decision, which rows train with which advantage, and how its
answers are cut into segments and weight versions. ``groups.safetensors`` holds what there is much of, in the same order:
``tokens`` int32 [N] of all segments, ``logp`` float32 [M] of those that a policy sampled. The prompts themselves come from
the data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from hapo_async.buffer import Ready
from hapo_async.sequences import Row, TrainGroup
from hapo_async.types import (
    Answer,
    Fault,
    GateDecision,
    GatedGroup,
    Group,
    GroupHeader,
    GroupKey,
    Judgement,
    Prompt,
    Segment,
    Source,
    Verdict,
    Version,
    VersionSpan,
)

log = logging.getLogger(__name__)

LINES, ARRAYS = "groups.jsonl", "groups.safetensors"


def write(folder: Path, groups: Sequence[tuple[Ready, Group | None]]) -> None:
    """Writes groups with their payloads (None where a group has none). One that is no JSON is left out. Raises OSError."""
    from safetensors.numpy import save

    tokens, logp = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    with (folder / LINES).open("w", encoding="ascii") as file:
        for ready, group in groups:
            try:
                line = json.dumps(_encode(ready, group))
            except (TypeError, ValueError) as error:  # what a user's reward function left there, say
                log.warning("group %s is not kept in the checkpoint: %s", ready.key, error)
                continue
            file.write(line + "\n")
            for segment in _segments(group):
                tokens.append(np.asarray(segment.tokens, np.int32))
                if segment.logp_behave is not None:
                    logp.append(np.asarray(segment.logp_behave, np.float32))
    (folder / ARRAYS).write_bytes(save({"tokens": np.concatenate(tokens), "logp": np.concatenate(logp)}))


def read(folder: Path, prompts: Mapping[str, Prompt], put: Callable[[Group], Any]) -> list[Ready]:
    """The groups again. put: makes a reference of a payload. Groups of prompts that are not there are left out; a folder
    without groups holds none. Raises ValueError, KeyError, TypeError or OSError for files that are not what ``write`` wrote."""
    if not (folder / LINES).exists():
        return []
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(folder / ARRAYS)
    except SafetensorError as error:
        raise ValueError(f"{folder / ARRAYS}: {error}") from None
    reader, out = _Reader(arrays["tokens"], arrays["logp"]), []
    for line in (folder / LINES).read_text(encoding="ascii").splitlines():
        row = json.loads(line)
        prompt = prompts.get(row["key"][1])
        group = reader.group(row, prompt)
        if prompt is not None:
            out.append(_ready(row, prompt, put(group) if group is not None else None))
    reader.check_end()
    return out


# --------------------------------------------------------------------------------------------------------------------
# To rows


def _segments(group: Group | None) -> list[Segment]:
    return [segment for answer in group.answers for segment in answer.segments] if group is not None else []


def _encode(ready: Ready, group: Group | None) -> dict[str, Any]:
    header, train = ready.header, ready.train
    told: dict[str, Any] = {f.name: getattr(header, f.name) for f in fields(header) if f.name != "key"}
    told |= {name: str(v) if (v := told[name]) is not None else None for name in ("oldest", "newest")}
    told["versions"] = [str(v) for v in header.versions]
    return {
        "key": list(ready.key),
        "header": told,
        "group": _encode_group(group) if group is not None else None,
        "judgements": [asdict(judgement) for judgement in ready.gated.judgements],
        "gate": asdict(ready.gated.gate),
        "train": {
            "prompt_length": train.prompt_length,
            "rows": [asdict(row) | {"source": int(row.source)} for row in train.rows],
            "confidence": train.confidence,
            "temperature": train.temperature,
        },
    }


def _encode_group(group: Group) -> dict[str, Any]:
    answers = [
        {
            "index": answer.index,
            "finish_reason": answer.finish_reason,
            "text": answer.text,
            "segments": [
                [int(s.source), len(s.tokens), [[str(span.version), span.start, span.end] for span in s.spans]]
                for s in answer.segments
            ],
        }
        for answer in group.answers
    ]
    return {
        "temperature": group.temperature,
        "generator": group.generator,
        "generator_pid": group.generator_pid,
        "answers": answers,
    }


# --------------------------------------------------------------------------------------------------------------------
# And back


class _Reader:
    """Cuts the arrays into segments, in the order of the rows."""

    def __init__(self, tokens: np.ndarray, logp: np.ndarray) -> None:
        self._tokens, self._logp = tokens, logp
        self._token = self._number = 0

    def group(self, row: Mapping[str, Any], prompt: Prompt | None) -> Group | None:
        """The payload of a row, where it has one; without its prompt it is only passed over."""
        told = row["group"]
        if told is None:
            return None
        answers = tuple(
            Answer(a["index"], tuple(self._segment(*s) for s in a["segments"]), a["finish_reason"], a["text"])
            for a in told["answers"]
        )
        tokens = np.asarray(prompt.tokens if prompt else [], np.int32)
        return Group(_key(row), tokens, answers, told["temperature"], told["generator"], told["generator_pid"])

    def _segment(self, source: int, length: int, spans: list[list[Any]]) -> Segment:
        is_policy = Source(source) is Source.POLICY
        tokens = self._tokens[self._token : self._token + length]
        self._token += length
        logp = self._logp[self._number : self._number + length] if is_policy else None
        self._number += length if is_policy else 0
        if len(tokens) != length:
            raise ValueError(f"{ARRAYS} holds fewer tokens than {LINES} names")
        cut = tuple(VersionSpan(Version.parse(version), start, end) for version, start, end in spans)
        return Segment(Source(source), tokens.copy(), None if logp is None else logp.copy(), cut)

    def check_end(self) -> None:
        if (self._token, self._number) != (len(self._tokens), len(self._logp)):
            raise ValueError(f"{ARRAYS} holds more tokens than {LINES} names")


def _key(row: Mapping[str, Any]) -> GroupKey:
    epoch, uid, attempt = row["key"]
    return GroupKey(int(epoch), str(uid), int(attempt))


def _ready(row: Mapping[str, Any], prompt: Prompt, payload: Any) -> Ready:
    key, told = _key(row), row["header"]
    header: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    header |= {name: Version.parse(told[name]) if told[name] else None for name in ("oldest", "newest")}
    header["versions"] = tuple(Version.parse(v) for v in told["versions"])
    judgements = tuple(
        Judgement(**{**j, "verdict": Verdict(j["verdict"]), "fault": Fault(j["fault"])}) for j in row["judgements"]
    )
    gated = GatedGroup(GroupHeader(key=key, **header), payload, prompt, judgements, GateDecision(**row["gate"]))
    rows = tuple(Row(**{**r, "source": Source(r["source"])}) for r in row["train"]["rows"])
    taught = next((r for r in rows if r.source is Source.TEACHER), None)
    sampled = any(r.source is Source.POLICY for r in rows)
    train = TrainGroup(
        key=key,
        payload=payload if sampled else None,
        prompt_length=row["train"]["prompt_length"],
        prompt_tokens=None if sampled else prompt.tokens,
        teacher=prompt.teachers[taught.index] if taught is not None else None,
        rows=rows,
        confidence=row["train"]["confidence"],
        temperature=row["train"]["temperature"],
    )
    return Ready(gated, train)
