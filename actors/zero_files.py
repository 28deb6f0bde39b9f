"""What the ZeRO learner writes: the policy for others to load, and DeepSpeed's state to resume from.

Saving has two halves. ``capture`` is a collective between two steps: it copies what belongs to the step boundary to host
memory, and then training goes on. ``write`` runs in a thread of each rank, beside training, and touches the copies alone.
The price is one more copy in host memory until it is written: of a rank's shard of weights and optimizer, and on rank 0 of
the whole policy.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actors import weights
from actors.zero import ZeroBackend
from hapo_async import checkpoint, lora
from hapo_async.errors import RunError
from hapo_async.files import sync

log = logging.getLogger(__name__)


@dataclass
class Captured:
    """A step boundary as one rank holds it. objects: what torch saves, by file. weights: the whole policy by Hugging Face's
    names, on rank 0. about: what meta.json says, on rank 0."""

    folder: Path
    objects: dict[Path, Any]
    weights: dict[str, torch.Tensor] | None = None
    about: dict[str, Any] | None = None


@dataclass(frozen=True)
class Written:
    """What a rank wrote: sizes and digests by the names below the checkpoint's folder. error: why not, "" where it did."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""


def capture(backend: ZeroBackend, folder: Path, stretch_bytes: int, rank_state: dict[str, Any]) -> Captured:
    """A collective, and nothing is written. rank_state: this rank's own (random states, schedule)."""
    from actors.host_copies import to_host

    captured = Captured(folder, backend.capture(folder / "state"))
    captured.objects[folder / "state" / f"rank{backend.rank}.pt"] = to_host(rank_state)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights.walk(backend, stretch_bytes):
        if backend.rank == 0:
            state[name] = tensor.to("cpu", copy=True)
    if backend.rank == 0:
        captured.weights = state
        captured.about = {
            "ranks": backend.world_size,
            "zero_stage": backend.stage,
            "critic": backend.policy.value_head is not None,
            "lora": _lora(backend),
            "deepspeed": _deepspeed_version(),
        }
    return captured


def write(captured: Captured, backend: ZeroBackend, source: str) -> Written:
    """Writes, syncs and describes this rank's files; no collective, and no error leaves it. source: the model whose tokenizer
    belongs to the policy. The copies are gone afterwards."""
    try:
        return Written(_write(captured, backend, source))
    except Exception as error:  # torch and safetensors have their own errors for a disk that is full
        log.warning("the checkpoint in %s cannot be written", captured.folder, exc_info=True)
        return Written(error=_why(error, captured.folder))
    finally:
        captured.objects.clear()
        captured.weights = None


@torch.no_grad()
def _write(captured: Captured, backend: ZeroBackend, source: str) -> dict[str, dict[str, Any]]:
    root, mine = captured.folder, list(captured.objects)
    if captured.weights is not None:
        _write_model(backend, captured.weights, root / "model", source)
        captured.weights = None
        mine += [path for path in (root / "model").rglob("*") if path.is_file()]
    for path in list(captured.objects):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(captured.objects.pop(path), path)
    if captured.about is not None:
        (root / "state" / "meta.json").write_text(json.dumps(captured.about), encoding="utf-8")
        mine.append(root / "state" / "meta.json")
    described = {}
    for path in mine:
        path.chmod(0o644)  # safetensors are written for their owner alone; a shared run folder is for colleagues too
        sync(path)
        described[path.relative_to(root).as_posix()] = checkpoint.describe(path)
    for folder in {path.parent for path in mine}:
        sync(folder)
    return described


def _write_model(backend: ZeroBackend, state: dict[str, torch.Tensor], folder: Path, source: str) -> None:
    """The policy as Hugging Face safetensors, with ``source``'s tokenizer. A LoRA policy is merged, and its adapter lies
    beside it in peft's format."""
    if backend.lora:
        state, adapter = lora.taken_apart(state, backend.lora.scale)
        lora.write(folder / lora.ADAPTER, adapter, backend.lora, backend.targets, source)
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = backend.policy.model
    model.save_pretrained(folder, state_dict=state)
    if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def _why(error: Exception, folder: Path) -> str:
    """The error in a line, and how much room there is: torch does not tell."""
    if isinstance(error, OSError) and error.strerror:
        why = f"{error.strerror}: {error.filename or folder}"
    else:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    try:
        return f"{why} ({shutil.disk_usage(folder.parent).free / 1e6:.1f} MB free)"
    except OSError:
        return why


def load_state(backend: ZeroBackend, folder: Path) -> dict[str, Any]:
    """Restores weights and optimizer; returns this rank's own state (rank 0's, where fewer ranks wrote it).

    What another number of ranks wrote is first converted to DeepSpeed's universal format, next to the checkpoint's
    folder. Raises RunError for another ZeRO stage or adapter, for a critic on one side only, and for a failed conversion.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["zero_stage"] != backend.stage:
        raise RunError(
            f"the checkpoint {folder.parent} was written with learner.zero_stage={meta['zero_stage']}, this run has "
            f"{backend.stage}; DeepSpeed's state is cut to that shape. Resume with learner.zero_stage="
            f"{meta['zero_stage']}, or start a new run with model={folder.parent / 'model'}."
        )
    has, had = backend.policy.value_head is not None, meta.get("critic", False)
    if has != had:
        raise RunError(
            f"the checkpoint {folder.parent} was written {'with' if had else 'without'} a critic, and this run has "
            f"{'one' if has else 'none'}. Resume with the algorithm and options that wrote it, or start a new run with "
            f"model={folder.parent / 'model'}."
        )
    if meta.get("lora") != _lora(backend):
        raise RunError(
            f"the checkpoint {folder.parent} was written with learner.lora={meta.get('lora') or {}}, this run has "
            f"{_lora(backend) or {}}. Resume with the former, or start a new run with model={folder.parent / 'model'}."
        )
    if meta["ranks"] == backend.world_size:
        backend.load(folder)
    else:
        _load_resharded(backend, folder, meta["ranks"])
    rank = backend.rank if backend.rank < meta["ranks"] else 0
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def _load_resharded(backend: ZeroBackend, folder: Path, ranks: int) -> None:
    """Loads shards of ``ranks`` ranks into another number of them. The converter is DeepSpeed's own program, and it unpickles:
    it is only given files that hold tensors and plain data."""
    from actors.host_copies import check

    target = folder.parent.with_name(f".{folder.parent.name}-universal")
    failure = ""
    if backend.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        try:
            for path in sorted((folder / "zero").glob("*.pt")):
                check(path)
            failure = _convert(folder / "zero", target / "zero")
        except RunError as error:  # the others wait: raise only behind them
            failure = str(error)
    if backend.agree_max([int(bool(failure))])[0]:
        raise RunError(
            f"the state in {folder} of {ranks} ranks could not be converted for {backend.world_size}: {failure}"
        )
    try:
        backend.load(target, universal=True)
    finally:
        _barrier(backend)
        if backend.rank == 0:
            shutil.rmtree(target, ignore_errors=True)


def _convert(source: Path, target: Path) -> str:
    """Why it failed, "" where it did not."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr[-2000:] if done.returncode else ""


def _lora(backend: ZeroBackend) -> dict[str, Any] | None:
    """What fixes an adapter's shape and meaning."""
    if backend.lora is None:
        return None
    return {"rank": backend.lora.rank, "alpha": backend.lora.alpha, "targets": sorted(backend.targets)}


def _barrier(backend: ZeroBackend) -> None:
    backend.agree_max([0])


def _deepspeed_version() -> str:
    import deepspeed

    return str(deepspeed.__version__)
