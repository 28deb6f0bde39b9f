"""What travels through the system: prompts, answers, versions, verdicts and groups.

Legend for array shapes, used everywhere: P prompts, G answers in a group, T tokens of one sequence,
N packed tokens, V vocabulary, K top-K.

Everything here is immutable and free of torch, so that it pickles fast inside Ray and reads the same in a
generator, the driver and a learner rank. Token ids are the truth: text is derived from them once, by the
generator, for the verifier, and never tokenised back.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

SUCCESS = 1.0
"""An answer with at least this reward is a success: for the gate, for pairs, for signed advantages, for accuracies."""


class Source(enum.IntEnum):
    """Who wrote a token. The loss mask derives from it: policy and teacher tokens train, others do not."""

    PROMPT = 0
    POLICY = 1
    TEACHER = 2
    ENVIRONMENT = 3


class Version(NamedTuple):
    """A weight version. ``incarnation`` counts learner (re)starts, ``step`` learner steps; ordered in that order."""

    incarnation: int
    step: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> Version:
        incarnation, _, step = text.partition(".")
        return cls(int(incarnation), int(step))


class VersionSpan(NamedTuple):
    """Tokens ``[start, end)`` of a segment were sampled under ``version``."""

    version: Version
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one source.

    tokens: int32 [T]. logp_behave: float32 [T], log-prob of each token under the distribution it was sampled from
    (after temperature); ``spans`` cover [0, T) without gaps. Both exist for POLICY segments and for no others.
    """

    source: Source
    tokens: np.ndarray
    logp_behave: np.ndarray | None = None
    spans: tuple[VersionSpan, ...] = ()

    def __post_init__(self) -> None:
        is_policy = self.source is Source.POLICY
        if is_policy != (self.logp_behave is not None):
            raise ValueError(f"a {self.source.name} segment must {'' if is_policy else 'not '}carry logp_behave")
        if self.logp_behave is None:
            return
        if len(self.logp_behave) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.logp_behave)} behaviour log-probs")
        edge = 0
        for span in self.spans:
            if span.start != edge or span.end < span.start:
                raise ValueError(f"version spans {self.spans} do not tile [0, {len(self.tokens)})")
            edge = span.end
        if edge != len(self.tokens):
            raise ValueError(f"version spans {self.spans} do not tile [0, {len(self.tokens)})")


@dataclass(frozen=True)
class Answer:
    """One sampled (or injected) response: everything after the prompt, as ordered segments.

    finish_reason: "stop" (ended by itself), "length" (ran out of tokens), "abort" (a resumable prefix),
    "teacher" (an injected trajectory). ``text`` is decoded without special tokens, for verifiers and people.
    """

    index: int
    segments: tuple[Segment, ...]
    finish_reason: str
    text: str = ""

    @property
    def tokens(self) -> np.ndarray:
        """int32 [T]: all response tokens."""
        return _cat([s.tokens for s in self.segments], np.int32)

    @property
    def sources(self) -> np.ndarray:
        """int8 [T]: the Source of each response token."""
        return _cat([np.full(len(s.tokens), int(s.source)) for s in self.segments], np.int8)

    @property
    def logp_behave(self) -> np.ndarray:
        """float32 [T]: behaviour log-prob of each policy token, NaN elsewhere."""
        parts = [s.logp_behave if s.logp_behave is not None else np.full(len(s.tokens), np.nan) for s in self.segments]
        return _cat(parts, np.float32)

    @property
    def version_steps(self) -> np.ndarray:
        """int32 [T]: ``Version.step`` of each policy token, -1 elsewhere."""
        out = np.full(self.length, -1, np.int32)
        offset = 0
        for segment in self.segments:
            for span in segment.spans:
                out[offset + span.start : offset + span.end] = span.version.step
            offset += len(segment.tokens)
        return out

    @property
    def length(self) -> int:
        return sum(len(s.tokens) for s in self.segments)

    @property
    def spans(self) -> tuple[VersionSpan, ...]:
        """All version spans with positions relative to the response."""
        out, offset = [], 0
        for segment in self.segments:
            out += [VersionSpan(s.version, s.start + offset, s.end + offset) for s in segment.spans]
            offset += len(segment.tokens)
        return tuple(out)


@dataclass(frozen=True)
class Sampling:
    """How a group is sampled. temperature 0 is greedy. Training needs top_p=1 and top_k=0: only then has
    the recorded log-prob the meaning that importance ratios need."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Teacher:
    """A demonstration. tokens: int32 [T], with end-of-text. ``rejected`` names why it may not be injected, or is None."""

    text: str
    tokens: np.ndarray
    rejected: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A task. tokens: int32 [T], the chat template already applied; ``truth`` goes to the verifier as it is."""

    uid: str
    messages: tuple[Mapping[str, str], ...]
    tokens: np.ndarray
    truth: Any
    source: str = ""
    verifier: str = "auto"
    teachers: tuple[Teacher, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The last user message: what a person would call the question."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


class GroupKey(NamedTuple):
    """Names one attempt at one prompt of one epoch. Late answers of an older attempt are fenced by it."""

    epoch: int
    uid: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.epoch}/{self.uid}/{self.attempt}"


@dataclass(frozen=True)
class GroupRequest:
    """Work for a generator: sample ``sampling.n`` answers to one prompt. ``prefixes`` resume unfinished answers."""

    key: GroupKey
    prompt_tokens: np.ndarray
    sampling: Sampling
    prefixes: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Group:
    """The payload: one prompt and its answers. It travels as an object reference."""

    key: GroupKey
    prompt_tokens: np.ndarray
    answers: tuple[Answer, ...]
    temperature: float
    generator: str
    generator_pid: int


@dataclass(frozen=True)
class GroupHeader:
    """What the driver sees of a group: enough to decide, small enough to copy.

    answer_steps: the oldest ``Version.step`` of each answer, -1 where it holds no policy token. ``oldest`` and
    ``newest`` are None only for a group without any policy token (demonstrations alone, or handed over before the first
    token): it has no age. ``versions``: all that wrote a token, in their order.
    """

    key: GroupKey
    lengths: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    answer_steps: tuple[int, ...]
    oldest: Version | None
    newest: Version | None
    prompt_length: int
    generator: str
    seconds: float
    versions: tuple[Version, ...] = ()

    @classmethod
    def of(cls, group: Group, seconds: float) -> GroupHeader:
        versions = [span.version for answer in group.answers for span in answer.spans]
        return cls(
            key=group.key,
            lengths=tuple(a.length for a in group.answers),
            finish_reasons=tuple(a.finish_reason for a in group.answers),
            answer_steps=tuple(min((s.version.step for s in a.spans), default=-1) for a in group.answers),
            oldest=min(versions, default=None),
            newest=max(versions, default=None),
            prompt_length=len(group.prompt_tokens),
            generator=group.generator,
            seconds=seconds,
            versions=tuple(sorted(set(versions))),
        )


class Verdict(enum.StrEnum):
    """What a verifier says. CORRECT, WRONG and UNPARSEABLE (a wrong answer without a readable result) judge the answer; the
    others are failures of the judge, and ``Fault`` says who pays for them."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    OOM = "oom"
    CRASH = "crash"


FAILURES = frozenset((Verdict.TIMEOUT, Verdict.OOM, Verdict.CRASH))


class Fault(enum.StrEnum):
    """Who pays for a timeout, an oom or a crash (``hapo_async.verify.attribution``).

    ANSWER: it fells its judge, again and again, and a benign one does not: reward 0. JUDGE: a benign answer fails as well.
    PROMPT: its truth cannot be judged, whatever the answer. PLUGIN: a reward function of the user's that chose not to judge.
    All but ANSWER are masked. NONE: nobody yet, or nothing failed.
    """

    NONE = ""
    ANSWER = "answer"
    JUDGE = "judge"
    PROMPT = "prompt"
    PLUGIN = "plugin"


@dataclass(frozen=True)
class Judgement:
    """A verdict with its reward. ``reward`` is None exactly when the answer was not judged: it is masked. A failure that is
    charged to the answer keeps its verdict and has reward 0. seconds: all tries together."""

    verdict: Verdict
    reward: float | None
    components: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    detail: str = ""
    fault: Fault = Fault.NONE

    def __post_init__(self) -> None:
        failed = self.verdict in FAILURES
        if (self.reward not in (None, 0.0)) if failed else (self.reward is None):
            raise ValueError(f"verdict {self.verdict} cannot carry reward {self.reward}")

    @property
    def is_judged(self) -> bool:
        return self.reward is not None

    @property
    def tally(self) -> tuple[str, ...]:
        """What it counts as: its verdict; also ``masked`` where it is not judged, ``charged`` where the answer pays."""
        if not self.is_judged:
            return (str(self.verdict), "masked")
        return (str(self.verdict), "charged") if self.verdict in FAILURES else (str(self.verdict),)


@dataclass(frozen=True)
class GateDecision:
    """What the gate saw and said about one group (ALGORITHMS: HAPO's gate, the SSI operator).

    replaced / teacher: indices into the group's answers and the prompt's teachers, None when nothing is injected.
    ``reason`` says why nothing was injected although the gate was open, or why it stayed closed. threshold: gamma at
    that moment of the run. draw: the success rate that was compared with it, where that is drawn and not the confidence.
    """

    is_open: bool
    successes: int
    judged: int
    confidence: float
    replaced: int | None = None
    teacher: int | None = None
    reason: str = ""
    threshold: float = 0.0
    draw: float | None = None

    @property
    def is_unverified(self) -> bool:
        """True where too few answers were judged to say anything."""
        return self.reason.startswith("unverified")


@dataclass(frozen=True)
class GatedGroup:
    """A complete, judged and gated group as the buffer holds it. ``payload`` is an object reference to a Group."""

    header: GroupHeader
    payload: Any
    prompt: Prompt
    judgements: tuple[Judgement, ...]
    gate: GateDecision

    @property
    def key(self) -> GroupKey:
        return self.header.key

    @property
    def rewards(self) -> np.ndarray:
        """float64 [G]: rewards of the sampled answers, before injection; 0 where unjudged."""
        return np.array([j.reward or 0.0 for j in self.judgements])

    @property
    def judged(self) -> np.ndarray:
        """bool [G]."""
        return np.array([j.is_judged for j in self.judgements])


def _cat(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
