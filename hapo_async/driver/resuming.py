"""What is in a run folder already: a checkpoint to continue from, another run, or a finished one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from hapo_async import checkpoint, group_files, metrics
from hapo_async.buffer import Buffer, Ready
from hapo_async.config import Config
from hapo_async.data import PromptStream
from hapo_async.driver import checkpoints
from hapo_async.driver.offline import Offline
from hapo_async.driver.outcome import Outcome
from hapo_async.driver.setup import Prepared
from hapo_async.errors import ConfigError, RunError
from hapo_async.events import Events
from hapo_async.rundir import RunDir
from hapo_async.secrets import redacted
from hapo_async.types import Prompt

log = logging.getLogger(__name__)


def find_checkpoint(config: Config, folder: RunDir) -> checkpoint.Checkpoint | None:
    """The checkpoint that the run goes on from, after what a crash has left was put in order. Damaged ones are said, and are in
    events.jsonl. Raises ConfigError, RunError."""
    found, told = None, list[tuple[str, str, str]]()
    try:
        checkpoint.tidy(folder.checkpoints)
        found = checkpoints.find(folder.checkpoints, lambda *event: told.append(event))
    finally:
        events = Events(folder.path, lambda: found.step if found else 0, log.error)
        for event in told:
            events.add(*event)
    if found is not None:
        folder.seen_incarnation = found.driver["incarnation"]
    if found is None and config.run.resume == "must":
        raise ConfigError(f"run.resume=must, but {str(folder.checkpoints)!r} holds no checkpoint.")
    if found is None and folder.has_metrics:
        raise ConfigError(
            f"run.dir={str(folder.path)!r} holds a run without a checkpoint, which cannot be continued. Give another run.dir, "
            "or run.resume=never to move it aside and start afresh."
        )
    return found


def refuse_another_run(config: Config, folder: RunDir) -> None:
    """Raises ConfigError where the folder holds a run of another algorithm, model, adapter or data: it would be taken for
    this one's. Other settings may change on the way."""
    before = folder.read_config()
    kept: dict[str, Any] = {"algorithm": config.algorithm, "model": config.model, "data.train": config.data.train}
    kept["learner.lora"] = config.learner.lora
    for key, mine in kept.items():
        there: Any = before
        for part in key.split("."):
            there = there.get(part, {}) if isinstance(there, dict) else {}
        if isinstance(there, type(mine)) and there not in (mine, redacted(mine)):
            raise ConfigError(
                f"run.dir={str(folder.path)!r} holds a run with {key}={there!r}, this one has {key}={mine!r}. Give another "
                "run.dir, or run.resume=never to move that run aside and start afresh."
            )


def open_stream(prepared: Prepared, resumed: checkpoint.Checkpoint | None) -> PromptStream:
    """The data where the checkpoint left them. Raises DataError when these are other data, or in another order."""
    c = prepared.config
    stream = PromptStream(prepared.prompts, c.seed, c.data.shuffle, c.data.epochs)
    if resumed:
        stream.restore(resumed.driver["cursor"])
        if resumed.driver["config_digest"] != c.digest():
            log.warning("continuing from step %d with a changed configuration", resumed.step)
        before, now = resumed.driver.get("packages", {}), checkpoints.packages()
        changed = [f"{name} {before[name]} is now {now.get(name)}" for name in before if before[name] != now.get(name)]
        if changed:
            log.warning("continuing from step %d with other packages: %s", resumed.step, ", ".join(changed))
    return stream


def waiting_groups(config: Config, resumed: checkpoint.Checkpoint | None, prompts: Mapping[str, Prompt]) -> list[Ready]:
    """The groups that waited in the buffer when the checkpoint was made, their payloads in the object store again. Those that are
    too old for this configuration, or more than it lets wait, are left out: they are sampled anew."""
    if resumed is None:
        return []
    try:
        groups = group_files.read(resumed.path, prompts, ray.put)
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.error("the groups in %s are sampled anew: %s: %s", resumed.path, type(error).__name__, error)
        return []
    fresh = [g for g in groups if 0 <= Buffer.staleness(g, resumed.step) <= config.max_staleness]
    return fresh[: config.most_untrained]


def already_done(folder: RunDir, found: checkpoint.Checkpoint) -> Outcome:
    if not checkpoint.is_copied(found.path, "model", folder.model):  # an earlier stop leaves one too
        copy_model(found.path / "model", folder.model)
    rows = metrics.read(folder.path)
    evals = [{k: v for k, v in r.items() if k.startswith("eval/")} for r in rows]
    evals = [e for e in evals if e] or [{}]
    return Outcome(folder.path, found.step, True, 0.0, evals[0], evals[-1])


def early_note(folder: RunDir, offline: Offline) -> str:
    best = folder.checkpoints / f"step-{offline.early.best_step}" / "model"
    return offline.early.text() + (f" (its model: {best})" if best.is_dir() else "")


def copy_model(source: Path, target: Path) -> None:
    """Raises RunError where there is no room for it."""
    beside = target.with_name(".model.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(source, beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
    except OSError as error:  # copytree's own kind has no strerror, but a list of (source, target, why)
        shutil.rmtree(beside, ignore_errors=True)
        why = error.strerror or str(error.args[0][0][2])
        raise RunError(
            f"the trained model lies in {source}, but could not be copied to {target}: {why}. Make room, then the same command "
            "copies it."
        ) from None
