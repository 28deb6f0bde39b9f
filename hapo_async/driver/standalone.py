"""``hapo-async eval``: the generators, verifiers and evaluator of a run, without a learner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from actors import placement
from actors.calls import answer
from hapo_async import data, verify
from hapo_async.config import Config, EvalConfig
from hapo_async.driver.evaluation import Evaluator, Scored, summarise
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.setup import check_context, check_libraries, free_name
from hapo_async.errors import ConfigError, DataError
from hapo_async.evaluation import analyses, evaluate, verdicts
from hapo_async.files import json_line
from hapo_async.guardian import Guardian
from hapo_async.types import Prompt

log = logging.getLogger(__name__)

FETCH_DEADLINE_S = 120.0

Settings = Callable[[str], EvalConfig]
"""The settings of a set, by ``evaluate.set_name``."""


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set and how it is asked."""

    source: str
    prompts: list[Prompt]
    settings: EvalConfig


def evaluate_model(
    config: Config,
    settings: Settings | None = None,
    bootstrap: int = 0,
    save: Path | None = None,
    analyse: bool = False,
) -> dict[str, float]:
    """Metrics of ``config.model`` on ``config.data.eval``. Raises UserError before anything starts, RunError after.

    settings: how each set is asked; ``config.eval`` when not given. bootstrap: draws of bootstrap pass@k, 0 for none. save:
    a file for all answers. analyse: also what ``hapo_async.evaluation.analyses`` measures.
    """
    verify.resolve(config.verifier.name)
    check_libraries(config, None)
    model_path = data.resolve_model(config.model)
    tokenizer = data.load_tokenizer(model_path)
    benchmarks = _load(config, model_path, tokenizer, settings or (lambda _: config.eval))
    asked = {name: b.prompts for name, b in benchmarks.items()}
    wanted = {(name, p.uid) for name, b in benchmarks.items() for p in b.prompts[: analyses.PROMPTS] if analyse}
    keeper = _Keeper(wanted)
    if save:
        keeper.open(save)
    with Guardian() as guardian:
        cluster = placement.join(config.generator.count)
        try:
            guardian.tell(cluster.pids)
            scored = asyncio.run(_score(config, model_path, cluster, benchmarks, keeper if save or analyse else None))
        finally:
            cluster.stop()
            keeper.close()
    metrics: dict[str, float] = {}
    for name, results in scored.items():
        sizes = evaluate.ladder(benchmarks[name].settings.k)
        metrics |= summarise(name, results, sizes, bootstrap, config.seed)
    metrics |= evaluate.macro_average(metrics, list(asked))
    return metrics | (_analyse(config, model_path, tokenizer, benchmarks, keeper) if analyse else {})


def _load(config: Config, model_path: str, tokenizer: Any, settings: Settings) -> dict[str, Benchmark]:
    out: dict[str, Benchmark] = {}
    for source in config.data.eval:
        prompts, report = data.load_prompts(config, source, tokenizer, "eval")
        if not prompts:
            raise DataError(f"evaluation set {source!r} holds no usable prompt: {report.text()}")
        chosen = settings(evaluate.set_name(source))
        name = free_name(evaluate.set_name(source), {**out, evaluate.MACRO: None})
        prompts = prompts[: chosen.limit or None]
        out[name] = Benchmark(source, prompts, _fit(config, chosen, model_path, prompts))
    return out


def _fit(config: Config, settings: EvalConfig, model_path: str, prompts: list[Prompt]) -> EvalConfig:
    """``settings`` with answers short enough for the model's positions. Raises ConfigError when a prompt leaves none."""
    room = data.context_tokens(model_path) - max(len(p.tokens) for p in prompts)
    wanted = settings.max_tokens or config.sampling.max_tokens
    if room >= wanted:
        return settings
    if room < 1 or settings.max_tokens:
        check_context(config.model_copy(update={"eval": settings}), model_path, prompts)
    log.warning("answers are limited to %d tokens: the longest prompt leaves no more in this model's positions", room)
    return settings.model_copy(update={"sampling": settings.sampling | {"max_tokens": room}})


async def _score(
    config: Config,
    model_path: str,
    cluster: placement.Cluster,
    benchmarks: Mapping[str, Benchmark],
    keeper: _Keeper | None,
) -> dict[str, list[Scored]]:
    share = placement.cpu_share(cluster, config.generator.count)
    fleet = await Fleet.start(config, model_path, cluster, share, lambda: None)
    judges = await Judges.start(config)
    sets = {name: b.prompts for name, b in benchmarks.items()}
    settings = {name: b.settings for name, b in benchmarks.items()}
    try:
        evaluator = Evaluator(config, sets, fleet, judges, settings=settings, keep=keeper)
        return await evaluator.score_all(0)
    finally:
        await judges.close()
        await fleet.close()


@dataclass
class _Keeper:
    """Writes every answered question to a file as it comes, and holds those that are analysed."""

    wanted: set[tuple[str, str]]
    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _file: IO[str] | None = None

    def open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the answers cannot be saved to {str(path)!r}: {error.strerror}.") from None

    async def __call__(self, name: str, scored: Scored, payload: Any) -> None:
        group = await answer(payload, FETCH_DEADLINE_S, scored.header.generator)
        row = verdicts.describe(name, scored.prompt, group, scored.judgements)
        if (name, scored.prompt.uid) in self.wanted:
            self.rows[name, scored.prompt.uid] = row
        if self._file:
            self._file.write(json_line(row, default=str))

    def close(self) -> None:
        if self._file:
            self._file.close()


def _analyse(
    config: Config, model_path: str, tokenizer: Any, benchmarks: Mapping[str, Benchmark], keeper: _Keeper
) -> dict[str, float]:
    """Oracle coverage where the data have solutions, and diversity, of the first prompts of each set."""
    probe = analyses.Probe(model_path)
    out: dict[str, float] = {}
    for name, benchmark in benchmarks.items():
        rows = [keeper.rows[name, p.uid] for p in benchmark.prompts if (name, p.uid) in keeper.rows]
        teachers = _solutions(config, benchmark, model_path, tokenizer)
        out |= analyses.of_set(probe, name, teachers, rows)
    return out


def _solutions(config: Config, benchmark: Benchmark, model_path: str, tokenizer: Any) -> list[analyses.Pair]:
    """The first verified solution of each prompt, of whatever length the model's positions hold."""
    length = {"sampling": config.sampling.model_copy(update={"max_tokens": data.context_tokens(model_path)})}
    limit = {"data": config.data.model_copy(update={"limit": len(benchmark.prompts), "demonstrations": -1})}
    try:
        loaded, _ = data.load_prompts(config.model_copy(update=length | limit), benchmark.source, tokenizer, "train")
    except DataError as error:
        log.warning("no oracle coverage of %s: %s", benchmark.source, error)
        return []
    solutions = [(p, next((t for t in p.teachers if t.rejected is None), None)) for p in loaded]
    return [analyses.Pair(p.tokens, t.tokens) for p, t in solutions if t is not None]
