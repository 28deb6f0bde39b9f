"""Cached answers: what the initial policy said to every training prompt, judged once, for algorithms that learn offline.

A folder (``data.answers``) holds

| file                    | what                                                                                        |
|-------------------------|---------------------------------------------------------------------------------------------|
| ``about.json``          | the recipe: model, data, sampling and verifier that made the answers                        |
| ``answers.jsonl``       | a line per prompt, as they were finished: tokens, log-probs when sampled, verdict, reward   |
| ``MANIFEST.json``       | written last, with size and sha256 of both; without it the generation goes on where it was  |
| ``reference.safetensors`` | log-probs at T = 1 of the answers of mixed prompts under the policy that gave them        |

Rows are read where they are needed: what stays in memory is an index of lengths and verdicts.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from hapo_async import checkpoint
from hapo_async.errors import ConfigError, DataError
from hapo_async.files import replace_whole
from hapo_async.recipe import Recipe
from hapo_async.types import (
    SUCCESS,
    Answer,
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

ABOUT, ANSWERS, REFERENCE = "about.json", "answers.jsonl", "reference.safetensors"
SYNC_EVERY = 64  # rows between two fsyncs
NO_VERSION = Version(0, -1)
"""The version of a cached token: none, so that it has no age."""

MIXED = "mixed"
# --------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Entry:
    """What is known of a row without reading it again. offset: bytes into answers.jsonl."""

    offset: int
    lengths: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    judgements: tuple[Judgement, ...]
    generator: str

    @property
    def outcome(self) -> str:
        """``mixed``: judged answers of both kinds; else why there is nothing to compare."""
        right = [j.reward >= SUCCESS for j in self.judgements if j.reward is not None]
        if not right:
            return "unverified"
        return "all correct" if all(right) else MIXED if any(right) else "all wrong"

    def header(self, key: GroupKey, prompt: Prompt) -> GroupHeader:
        """A header without age: cached answers are never too old."""
        n = len(self.lengths)
        return GroupHeader(
            key, self.lengths, self.finish_reasons, (-1,) * n, None, None, len(prompt.tokens), self.generator, 0.0
        )


def _encode(prompt: Prompt, group: Group, judgements: Sequence[Judgement]) -> dict[str, Any]:
    answers = []
    for answer, judgement in zip(group.answers, judgements, strict=True):
        if any(s.source is not Source.POLICY for s in answer.segments):
            raise ValueError(f"answer {answer.index} of {prompt.uid} holds tokens that the policy did not write")
        answers.append(
            {
                "text": answer.text,
                "tokens": answer.tokens.tolist(),
                "logp_behave": [float(str(x)) for x in answer.logp_behave],  # the shortest text of each float32
                "finish_reason": answer.finish_reason,
                "verdict": str(judgement.verdict),
                "reward": judgement.reward,
                "components": dict(judgement.components),
                "detail": judgement.detail,
            }
        )
    return {"uid": prompt.uid, "prompt": prompt.text, "generator": group.generator, "answers": answers}


def _index(row: Mapping[str, Any], offset: int) -> Entry:
    """Raises KeyError, TypeError or ValueError for what is no row."""
    answers = row["answers"]
    return Entry(
        offset,
        tuple(len(a["tokens"]) for a in answers),
        tuple(a["finish_reason"] for a in answers),
        tuple(Judgement(Verdict(a["verdict"]), a["reward"], a["components"], 0.0, a["detail"]) for a in answers),
        row["generator"],
    )


def _group(row: Mapping[str, Any], key: GroupKey, prompt_tokens: np.ndarray) -> Group:
    """Temperature 1: offline log-probs are those of the policy itself, whatever it was sampled at."""
    answers = []
    for index, a in enumerate(row["answers"]):
        tokens = np.asarray(a["tokens"], np.int32)
        spans = (VersionSpan(NO_VERSION, 0, len(tokens)),) if len(tokens) else ()
        segment = Segment(Source.POLICY, tokens, np.asarray(a["logp_behave"], np.float32), spans)
        answers.append(Answer(index, (segment,), a["finish_reason"], a["text"]))
    return Group(key, prompt_tokens, tuple(answers), 1.0, row["generator"], 0)


# --------------------------------------------------------------------------------------------------------------------
# The folder


class AnswerCache:
    """One folder of answers. ``open`` only reads; between ``begin`` and ``seal`` rows are added, by one driver at a time.

    entries: by uid, of the rows that are there. complete: sealed, and never written again.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.recipe = recipe
        self.complete = False
        self.entries: dict[str, Entry] = {}
        self._file: IO[bytes] | None = None
        self._lock: IO[str] | None = None
        self._unsynced = 0
        self._logp: np.ndarray | None = None
        self._starts: dict[str, int] = {}

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> AnswerCache:
        """What the folder holds, which may be nothing. Raises ConfigError when its answers do not fit the recipe,
        DataError when a complete cache is damaged."""
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"data.answers={str(folder)!r} is a file; it must be a folder, which may not exist yet.")
        cache = cls(folder, recipe)
        cache._check_recipe()
        cache.complete = (folder / checkpoint.MANIFEST).exists()
        if cache.complete and (problem := checkpoint.verify(folder)):
            raise DataError(f"the answers in {str(folder)!r} are damaged: {problem}. {_REMOVE}")
        cache._scan()
        if cache.complete and len(cache.entries) != recipe.prompts:
            raise DataError(f"{str(folder)!r} holds {len(cache.entries)} of {recipe.prompts} prompts. {_REMOVE}")
        cache._load_reference()
        return cache

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts without answers."""
        return [p for p in prompts if p.uid not in self.entries]

    # ---------------------------------------------------------------- writing

    def begin(self) -> None:
        """Starts or continues the file; a row that was cut short is removed. Raises ConfigError when another driver is
        writing here, or has written another recipe meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(
                f"another run is sampling answers into {str(self.folder)!r}. Wait for it, or give another data.answers."
            ) from None
        self._check_recipe()
        _replace(self.folder / ABOUT, json.dumps(asdict(self.recipe), indent=1).encode())
        end = self._scan()
        self._file = (self.folder / ANSWERS).open("ab")
        if self._file.tell() > end:
            log.warning("%s: the last row was cut short and is sampled again", self.folder / ANSWERS)
            self._file.truncate(end)
            self._file.seek(end)

    def append(self, prompt: Prompt, group: Group, judgements: Sequence[Judgement]) -> None:
        """Adds the answers to one prompt; on disk for good after every SYNC_EVERY rows."""
        assert self._file is not None, "begin() first"
        if prompt.uid in self.entries:
            return
        row = _encode(prompt, group, judgements)
        entry = _index(row, self._file.tell())
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        self.entries[prompt.uid] = entry
        self._unsynced += 1
        if self._unsynced >= SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def seal(self) -> None:
        """The cache is complete: from now on it is only read."""
        assert self._file is not None, "begin() first"
        os.fsync(self._file.fileno())
        names = (ABOUT, ANSWERS)
        manifest = {"files": {name: checkpoint.describe(self.folder / name) for name in names}}
        _replace(self.folder / checkpoint.MANIFEST, json.dumps(manifest, indent=1).encode())
        self.complete = True
        self.close()

    def close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None

    # ---------------------------------------------------------------- reading

    def read(self, prompt: Prompt, key: GroupKey) -> Group:
        """The answers to a prompt as a group of that key, at temperature 1 and of no version."""
        with (self.folder / ANSWERS).open("rb") as file:
            file.seek(self.entries[prompt.uid].offset)
            row = json.loads(file.readline().decode("utf-8", "surrogatepass"))
        return _group(row, key, np.asarray(prompt.tokens, np.int32))

    @property
    def unjudged(self) -> int:
        """Answers that the verifier failed on."""
        return sum(j.reward is None for entry in self.entries.values() for j in entry.judgements)

    def mixed(self) -> list[str]:
        """The uids of prompts with right and wrong answers, in the order of the file."""
        return [uid for uid, entry in self.entries.items() if entry.outcome == MIXED]

    def _check_recipe(self) -> None:
        try:
            there = json.loads((self.folder / ABOUT).read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise DataError(f"{str(self.folder / ABOUT)!r} cannot be read: {error}. {_REMOVE}") from None
        if different := self.recipe.differences(there):
            raise ConfigError(
                f"the answers in {str(self.folder)!r} do not fit this run. {'; '.join(different)}. Use the settings they "
                "were made with, or give another data.answers folder, into which new ones are sampled."
            )

    def _scan(self) -> int:
        """Fills ``entries``; returns where the rows that can be read end."""
        self.entries = {}
        path, end = self.folder / ANSWERS, 0
        if not path.exists():
            return 0
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line.decode("utf-8", "surrogatepass")) if line.endswith(b"\n") else {}
                    self.entries[row["uid"]] = _index(row, end)
                except (ValueError, KeyError, TypeError):
                    break
                end += len(line)
        return end

    # ---------------------------------------------------------------- the reference's log-probs

    @property
    def has_reference(self) -> bool:
        return self._logp is not None

    def write_reference(self, scores: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Keeps log-probs at T = 1, float32 [T] per answer, of every mixed prompt; replaced whole."""
        from safetensors.numpy import save

        parts = [np.asarray(x, np.float32) for uid in self.mixed() for x in self._checked(uid, scores[uid])]
        logp = np.concatenate([np.zeros(0, np.float32), *parts])
        about = {"answers": self._answers_digest(), "digest": xxhash.xxh3_128_hexdigest(logp.data)}
        _replace(self.folder / REFERENCE, save({"logp": logp}, about))
        self._load_reference()

    def reference(self, uid: str) -> tuple[np.ndarray, ...]:
        """float32 [T] per answer of a mixed prompt."""
        assert self._logp is not None, "the reference has not scored these answers"
        logp, edges = self._logp, np.cumsum([self._starts[uid], *self.entries[uid].lengths])
        return tuple(logp[a:b] for a, b in itertools.pairwise(edges))

    def _checked(self, uid: str, scores: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        lengths = tuple(len(x) for x in scores)
        if lengths != self.entries[uid].lengths:
            raise ValueError(f"{uid}: log-probs of {lengths} tokens for answers of {self.entries[uid].lengths}")
        return scores

    def _load_reference(self) -> None:
        """Raises DataError for a file that is damaged; one of other answers is not used."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / REFERENCE
        if not self.complete or not path.exists():
            return
        try:
            with safe_open(path, "numpy") as file:
                about, logp = file.metadata() or {}, file.get_tensor("logp")
        except SafetensorError as error:
            raise DataError(f"{str(path)!r} is damaged: {error}. {_RESCORE}") from None
        if about.get("answers") != self._answers_digest():
            log.warning("%s belongs to other answers and is not used", path)
            return
        starts, end = {}, 0
        for uid in self.mixed():
            starts[uid] = end
            end += sum(self.entries[uid].lengths)
        if about.get("digest") != xxhash.xxh3_128_hexdigest(logp.data) or len(logp) != end:
            raise DataError(f"{str(path)!r} is damaged: its digest does not match. {_RESCORE}")
        self._logp, self._starts = logp, starts

    def _answers_digest(self) -> str:
        manifest = json.loads((self.folder / checkpoint.MANIFEST).read_text())
        return str(manifest["files"][ANSWERS]["sha256"])


_REMOVE = "Remove the folder, and the answers are sampled again."
_RESCORE = "Remove the file, and a new run scores the answers again."


# --------------------------------------------------------------------------------------------------------------------
# Files


def _replace(path: Path, content: bytes) -> None:
    """Several drivers may share the folder."""
    replace_whole(path, content, apart=f".{os.getpid()}")
