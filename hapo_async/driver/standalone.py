"""``hapo-async eval``: the generators, verifiers and evaluator of a run, without a learner."""

from __future__ import annotations

import asyncio
import logging

from actors import placement
from hapo_async import data, evaluate, verify
from hapo_async.config import Config
from hapo_async.driver.evaluation import Evaluator
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.setup import check_context, check_libraries, free_name
from hapo_async.errors import DataError
from hapo_async.types import Prompt

log = logging.getLogger(__name__)


def evaluate_model(config: Config) -> dict[str, float]:
    """Metrics of ``config.model`` on ``config.data.eval``. Raises UserError before anything starts, RunError after."""
    verify.resolve(config.verifier.name)
    check_libraries(config, None)
    model_path = data.resolve_model(config.model)
    tokenizer = data.load_tokenizer(model_path)
    sets: dict[str, list[Prompt]] = {}
    for source in config.data.eval:
        prompts, report = data.load_prompts(config, source, tokenizer, "eval")
        if not prompts:
            raise DataError(f"evaluation set {source!r} holds no usable prompt: {report.text()}")
        sets[free_name(evaluate.set_name(source), sets)] = prompts[: config.eval.limit or None]
    config = _fit(config, model_path, sets)
    cluster = placement.join(config.generator.count)
    try:
        return asyncio.run(_evaluate(config, model_path, cluster, sets))
    finally:
        cluster.stop()


def _fit(config: Config, model_path: str, sets: dict[str, list[Prompt]]) -> Config:
    """``config`` with answers short enough for the model's positions. Raises ConfigError when a prompt leaves none."""
    room = data.context_tokens(model_path) - max(len(p.tokens) for prompts in sets.values() for p in prompts)
    wanted = config.eval.max_tokens or config.sampling.max_tokens
    if room >= wanted:
        return config
    if room < 1 or config.eval.max_tokens:
        check_context(config, model_path, [p for prompts in sets.values() for p in prompts])
    log.warning("answers are limited to %d tokens: the longest prompt leaves no more in this model's positions", room)
    return config.model_copy(update={"eval": config.eval.model_copy(update={"max_tokens": room})})


async def _evaluate(
    config: Config, model_path: str, cluster: placement.Cluster, sets: dict[str, list[Prompt]]
) -> dict[str, float]:
    share = placement.cpu_share(cluster, config.generator.count)
    fleet = await Fleet.start(config, model_path, cluster, share, lambda: None)
    judges = await Judges.start(config)
    try:
        return await Evaluator(config, sets, fleet, judges).run(0)
    finally:
        await judges.close()
        await fleet.close()
