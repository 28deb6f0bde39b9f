"""What is in a run folder already: a checkpoint to continue from, another run, or a finished one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from hapo_async import checkpoint, metrics
from hapo_async.config import Config
from hapo_async.data import PromptStream
from hapo_async.driver.offline import Offline
from hapo_async.driver.outcome import Outcome
from hapo_async.driver.setup import Prepared
from hapo_async.errors import ConfigError
from hapo_async.rundir import RunDir

log = logging.getLogger(__name__)


def find_checkpoint(config: Config, folder: RunDir) -> checkpoint.Checkpoint | None:
    found = checkpoint.newest(folder.checkpoints)
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
        if isinstance(there, type(mine)) and there != mine:
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
    return stream


def already_done(folder: RunDir, found: checkpoint.Checkpoint) -> Outcome:
    if not folder.model.is_dir():
        copy_model(found.path / "model", folder.model)
    rows = metrics.read(folder.path)
    evals = [{k: v for k, v in r.items() if k.startswith("eval/")} for r in rows]
    evals = [e for e in evals if e] or [{}]
    return Outcome(folder.path, found.step, True, 0.0, evals[0], evals[-1])


def early_note(folder: RunDir, offline: Offline) -> str:
    best = folder.checkpoints / f"step-{offline.early.best_step}" / "model"
    return offline.early.text() + (f" (its model: {best})" if best.is_dir() else "")


def copy_model(source: Path, target: Path) -> None:
    beside = target.with_name(".model.writing")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
