"""What the ZeRO learner writes: the policy for others to load, and DeepSpeed's state to resume from.

Every function is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from actors import weights
from actors.zero import ZeroBackend
from hapo_async import lora
from hapo_async.errors import RunError


def save_model(backend: ZeroBackend, folder: Path, source: str, stretch_bytes: int) -> None:
    """The policy as Hugging Face safetensors, with ``source``'s tokenizer. Rank 0 holds one whole copy meanwhile. A LoRA
    policy is merged, and its adapter lies beside it in peft's format."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in weights.walk(backend, stretch_bytes):
        if backend.rank == 0:
            state[name] = tensor.cpu().clone()
    failure: Exception | None = None
    if backend.rank == 0:
        try:
            if backend.lora:
                state, adapter = lora.taken_apart(state, backend.lora.scale)
                lora.write(folder / lora.ADAPTER, adapter, backend.lora, backend.targets, source)
            _write_model(backend.policy.model, state, folder, source)
        except Exception as error:  # the others wait at the barrier: raise only behind it
            failure = error
    _barrier(backend)
    if failure is not None:
        raise failure


def _write_model(model: Any, state: dict[str, torch.Tensor], folder: Path, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state)
    if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def save_state(backend: ZeroBackend, folder: Path, rank_state: dict[str, Any]) -> None:
    """DeepSpeed's state and, beside it, each rank's own (random states, schedule)."""
    folder.mkdir(parents=True, exist_ok=True)
    if backend.rank == 0:
        meta = {
            "ranks": backend.world_size,
            "zero_stage": backend.stage,
            "critic": backend.policy.value_head is not None,
            "lora": _lora(backend),
            "deepspeed": _deepspeed_version(),
        }
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    torch.save(rank_state, folder / f"rank{backend.rank}.pt")
    backend.save(folder)
    _barrier(backend)


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
    """Loads shards of ``ranks`` ranks into another number of them. The converter is DeepSpeed's own program."""
    target = folder.parent.with_name(f".{folder.parent.name}-universal")
    failure = ""
    if backend.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(folder / "zero"), "--output_folder", str(target / "zero")]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failure = done.stderr[-2000:] if done.returncode else ""
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
