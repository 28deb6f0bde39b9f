"""From rows to tokenised prompts with checked teachers, and the report of what happened to them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from hapo_async import verify
from hapo_async.config import Config
from hapo_async.data.columns import ColumnMapping, get, recognise
from hapo_async.data.model import context_tokens, load_tokenizer
from hapo_async.data.source import Row, load_rows
from hapo_async.data.stream import keyed_order
from hapo_async.errors import DataError
from hapo_async.types import Prompt, Teacher
from hapo_async.verify.pool import VerifierPool

log = logging.getLogger(__name__)

Split = Literal["train", "eval"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DataReport:
    """What became of a source. ``rejected`` counts teachers by reason, ``left_out`` rows by reason.

    with_teacher: prompts with at least one usable teacher. ``kept_teachers`` of them keep it under data.demonstrations.
    """

    source: str
    name: str
    split: str
    mapping: ColumnMapping
    total: int
    used: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    teachers: int = 0
    accepted: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    with_teacher: int = 0
    duplicates: int = 0
    prompt_tokens_max: int = 0
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """A few lines for people: the mapping, then the counts."""
        out = f"{self.used} of {self.total} rows used" + _counts(self.left_out, "left out")
        lines = [f"{self.source} ({self.split})", f"  columns  {self.mapping.text()}"]
        lines.append(f"  prompts  {out}; longest {self.prompt_tokens_max} tokens")
        if self.duplicates:
            lines[-1] += f"; {self.duplicates} repeat another prompt"
        if self.teachers:
            checked = f"{self.accepted} of {self.teachers} usable" + _counts(self.rejected, "rejected")
            lines.append(f"  teachers {checked}; {self.with_teacher} prompts have one")
        return "\n".join(lines + [f"  warning  {w}" for w in self.warnings])


def load_prompts(
    config: Config,
    source: str,
    tokenizer: Any,
    split: Split = "train",
    progress: Progress | None = None,
) -> tuple[list[Prompt], DataReport]:
    """Reads, maps, tokenises and checks one source.

    Training prompts keep their teachers (checked for length, end-of-text and by the verifier, the latter in a process
    pool on all cores) when the algorithm uses teachers; evaluation prompts have none. ``progress(done, total)`` follows
    the verification. Raises DataError when nothing usable is left and when every teacher is longer than the context.
    """
    rows, name = load_rows(source)
    columns = config.data.columns
    if split == "eval":  # columns are named for the training data; an evaluation set may have its own
        columns = {role: column for role, column in columns.items() if get(rows[0], column) is not None}
    mapping = recognise(rows, columns)
    if mapping.truth is None and not verify.is_plugin(config.verifier.name):
        raise DataError(
            f"{source} has columns {', '.join(rows[0])}, none of which is known to hold the truth, and verifier "
            f"{config.verifier.name!r} compares with it. Name it: data.columns.truth=..."
        )
    limit = config.data.limit if split == "train" else config.eval.limit
    prompts, texts, counts = _prompts(config, rows[: limit or None], mapping, tokenizer, source, name)
    report = DataReport(
        source=source,
        name=name,
        split=split,
        mapping=mapping,
        total=len(rows[: limit or None]),
        used=len(prompts),
        left_out={k: v for k, v in counts.items() if v and k != "duplicates"},
        duplicates=counts["duplicates"],
        prompt_tokens_max=max((len(p.tokens) for p in prompts), default=0),
    )
    if not prompts:
        raise DataError(
            f"no prompt of {source} can be used{_counts(report.left_out, 'left out')}. {_advice(report, config)}"
        )
    if split == "train" and uses_teachers(config):
        prompts, report = _with_teachers(config, prompts, texts, tokenizer, report, progress)
    return prompts, report


def check_data(config: Config, progress: Progress | None = None) -> list[DataReport]:
    """`hapo-async check-data`: loads all sources as a run would. Raises DataError, ConfigError."""
    tokenizer = load_tokenizer(config.model)
    sources: list[tuple[str, Split]] = [(config.data.train, "train"), *((s, "eval") for s in config.data.eval)]
    return [load_prompts(config, source, tokenizer, split, progress)[1] for source, split in sources]


def uses_teachers(config: Config) -> bool:
    """Whether the algorithm ever looks at a demonstration."""
    from hapo_async import algorithms

    return algorithms.get(config.algorithm).composition != "rollouts" and config.data.demonstrations != 0


# --------------------------------------------------------------------------------------------------------------------
# Prompts


def _prompts(
    config: Config, rows: Sequence[Row], mapping: ColumnMapping, tokenizer: Any, source: str, name: str
) -> tuple[list[Prompt], list[list[str]], Counter[str]]:
    """(prompts, teacher texts of each, counts of rows left out by reason and of duplicates)."""
    keep_columns = verify.is_plugin(config.verifier.name)
    counts: Counter[str] = Counter(duplicates=0)
    seen: Counter[str] = Counter()
    prompts, texts = [], []
    for number, row in enumerate(rows, 1):
        messages = _messages(config, mapping.prompt_of(row, f"{source} row {number}"))
        truth = mapping.truth_of(row)
        if truth is None and mapping.truth is not None and not keep_columns:
            counts["no truth"] += 1
            continue
        tokens = encode_prompt(tokenizer, messages, config.data.chat_template)
        if len(tokens) > config.data.max_prompt_tokens:
            counts["too long"] += 1
            continue
        uid = str(row[mapping.uid]) if mapping.uid and mapping.uid in row else _hash(messages)
        seen[uid] += 1
        if seen[uid] > 1:
            counts["duplicates"] += 1
            uid = f"{uid}#{seen[uid]}"
        origin = str(row.get(mapping.source) or name) if mapping.source else name
        kept = row if keep_columns else {"level": row["level"]} if row.get("level") is not None else {}
        extra = {k: v for k, v in kept.items() if k != mapping.prompt}
        if keep_columns:
            extra["data_source"] = origin
        prompts.append(Prompt(uid, tuple(messages), tokens, truth, origin, config.verifier.name, extra=extra))
        texts.append(mapping.teachers_of(row))
    return prompts, texts, counts


def _messages(config: Config, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The data's messages with the config's system message (where there is none) and suffix."""
    if config.data.system and all(m["role"] != "system" for m in messages):
        messages = [{"role": "system", "content": config.data.system}, *messages]
    suffix = config.data.suffix
    if not suffix:
        return messages
    joint = "" if suffix[0].isspace() else "\n"
    return [{**m, "content": m["content"] + joint + suffix} if m["role"] == "user" else m for m in messages]


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]], chat_template: bool = True) -> np.ndarray:
    """int32 [T]. With the tokenizer's chat template where it has one (and ``chat_template``), else the messages as
    plain text, joined by empty lines."""
    if chat_template and getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return np.asarray(ids, np.int32)
    ids = tokenizer("\n\n".join(m["content"] for m in messages), verbose=False)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text
    return np.asarray(ids, np.int32)


def _hash(messages: Sequence[Mapping[str, str]]) -> str:
    """A uid that depends on the prompt's messages alone."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Teachers


def _with_teachers(
    config: Config,
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    tokenizer: Any,
    report: DataReport,
    progress: Progress | None,
) -> tuple[list[Prompt], DataReport]:
    """Attaches checked teachers; under data.demonstrations, to a seeded choice of prompts with a usable one."""
    wanted = config.data.demonstrations
    order = (
        keyed_order([p.uid for p in prompts], f"demonstrations/{config.seed}")
        if wanted >= 0
        else list(range(len(prompts)))
    )
    candidates = [i for i in order if texts[i]]
    limits = _Limits.of(config, tokenizer)
    rejected: Counter[str] = Counter()
    out = list(prompts)
    checked = kept = accepted = 0
    with _Judge(config, sum(len(texts[i]) for i in candidates) if wanted < 0 else wanted, progress) as judge:
        while candidates and (wanted < 0 or kept < wanted):
            size = len(candidates) if wanted < 0 else max(16, wanted - kept)  # only as many as are still missing
            block, candidates = candidates[:size], candidates[size:]
            owners = [i for i in block for _ in texts[i]]
            encoded = encode_teachers(tokenizer, [text for i in block for text in texts[i]])
            made = _checked(limits, prompts, list(zip(owners, encoded, strict=True)), judge)
            by_prompt: dict[int, list[Teacher]] = {}
            for i, teacher in made:
                by_prompt.setdefault(i, []).append(teacher)
            for i, teachers in by_prompt.items():
                usable = any(t.rejected is None for t in teachers)
                if wanted >= 0 and usable and kept >= wanted:
                    continue
                out[i] = replace(prompts[i], teachers=tuple(teachers))
                kept += usable
                checked += len(teachers)
                accepted += sum(t.rejected is None for t in teachers)
                rejected.update(t.rejected for t in teachers if t.rejected)
    report = replace(report, teachers=checked, accepted=accepted, rejected=dict(rejected), with_teacher=kept)
    return out, replace(report, warnings=_teacher_warnings(config, report, wanted))


def encode_teachers(tokenizer: Any, texts: Sequence[str]) -> list[Teacher]:
    """Solutions as answers: the tokens of each and the end-of-text token."""
    texts = [text.removesuffix(tokenizer.eos_token).rstrip() for text in texts]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [
        Teacher(text, np.asarray([*tokens, tokenizer.eos_token_id], np.int32))
        for text, tokens in zip(texts, ids, strict=True)
    ]


def _checked(
    limits: _Limits, prompts: Sequence[Prompt], teachers: Sequence[tuple[int, Teacher]], judge: _Judge
) -> list[tuple[int, Teacher]]:
    """Sets ``rejected``: too long, end-of-text inside, or what the verifier said."""
    out = [(i, replace(t, rejected=limits.flaw(prompts[i], t))) for i, t in teachers]
    asked = [n for n, (_, t) in enumerate(out) if t.rejected is None]
    verdicts = judge([(prompts[out[n][0]], out[n][1].text) for n in asked])
    for n, verdict in zip(asked, verdicts, strict=True):
        if verdict != "correct":
            out[n] = (out[n][0], replace(out[n][1], rejected=verdict))
    return out


@dataclass(frozen=True)
class _Limits:
    """What an answer's tokens must keep to: the longest answer, the model's context, one end-of-text at the end."""

    answer_tokens: int
    context_tokens: int
    eos: int

    @classmethod
    def of(cls, config: Config, tokenizer: Any) -> _Limits:
        return cls(config.sampling.max_tokens, context_tokens(config.model), tokenizer.eos_token_id)

    def flaw(self, prompt: Prompt, teacher: Teacher) -> str | None:
        length = len(teacher.tokens)
        if length > self.answer_tokens or len(prompt.tokens) + length > self.context_tokens:
            return "too long"
        return "end-of-text inside" if (teacher.tokens[:-1] == self.eos).any() else None


class _Judge:
    """Verdicts on teachers. Exact matches are settled here; the rest goes to a pool that is started on first need."""

    def __init__(self, config: Config, total: int, progress: Progress | None) -> None:
        self._config, self._total, self._progress = config, total, progress
        self._pool: VerifierPool | None = None
        self._done = 0

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.close()

    def __call__(self, items: Sequence[tuple[Prompt, str]]) -> list[str]:
        name = self._config.verifier.name
        out = ["unverified"] * len(items)
        rest = []
        for n, (prompt, text) in enumerate(items):
            if name in ("auto", "boxed"):
                out[n] = str(verify.boxed.verdict(text, prompt.truth))
            if name != "boxed" and out[n] != "correct":
                rest.append(n)
        self._tell(len(items) - len(rest))
        if rest:
            self._pool = self._pool or VerifierPool(name, os.cpu_count() or 1, self._config.verifier.timeout_s)
            asked = [(items[n][0].text, items[n][1], items[n][0].truth, items[n][0].extra) for n in rest]
            for n, judgement in zip(rest, self._pool.judge(asked, lambda *_: self._tell(1)), strict=True):
                out[n] = str(judgement.verdict)
        return out

    def _tell(self, count: int) -> None:
        self._done += count
        if self._progress and count:
            self._progress(min(self._done, self._total), self._total)


def _teacher_warnings(config: Config, report: DataReport, wanted: int) -> tuple[str, ...]:
    """Raises DataError where no teacher is usable because of its length, or the algorithm cannot do without one."""
    if report.teachers and not report.accepted and report.rejected.get("too long", 0) == report.teachers:
        raise DataError(
            f"{report.source}: all {report.teachers} teacher solutions are longer than the context. An answer may have "
            f"sampling.max_tokens={config.sampling.max_tokens} tokens, and together with its prompt the model's "
            f"{context_tokens(config.model)}. Raise sampling.max_tokens, take a model with a longer context, or use an "
            "algorithm without teachers, such as grpo."
        )
    warnings = []
    if not report.accepted:
        what = f"none of the {report.teachers} teacher solutions is usable{_counts(report.rejected, 'rejected')}"
        what = (
            what if report.teachers else "the data has no teacher solutions (data.columns.teacher names their column)"
        )
        if config.algorithm == "sft":
            raise DataError(f"{report.source}: {what}, and algorithm sft learns from nothing else.")
        warnings.append(f"{what}: {config.algorithm} will never see a demonstration")
    elif wanted > report.with_teacher:
        warnings.append(f"data.demonstrations={wanted}, but only {report.with_teacher} prompts have a usable teacher")
    return tuple(warnings)


def _advice(report: DataReport, config: Config) -> str:
    if report.left_out.get("too long", 0) > report.left_out.get("no truth", 0):
        return f"Raise data.max_prompt_tokens (now {config.data.max_prompt_tokens})."
    return "Check which column holds the truth (data.columns.truth)."


def _counts(counts: Mapping[str, int], title: str) -> str:
    return f" ({title}: {', '.join(f'{n} {reason}' for reason, n in sorted(counts.items()))})" if counts else ""
