"""What sampled answers depend on: when two recipes are equal, answers made by one serve the other."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hapo_async.config import Config
from hapo_async.types import Prompt

log = logging.getLogger(__name__)

_KEYS = {
    "model": "model",
    "data": "data.train (its rows, data.limit, data.system, data.suffix)",
    "prompts": "data.limit",
    "n": "sampling.n",
    "temperature": "sampling.temperature",
    "max_tokens": "sampling.max_tokens",
    "verifier": "verifier.name",
}


@dataclass(frozen=True)
class Recipe:
    """What answers depend on. model: ``model_identity``. data: a digest of uids, prompt tokens and truths."""

    model: str
    data: str
    prompts: int
    n: int
    temperature: float
    max_tokens: int
    verifier: str

    @classmethod
    def of(cls, config: Config, prompts: Sequence[Prompt], model_path: str) -> Recipe:
        s = config.sampling
        return cls(
            model=model_identity(model_path),
            data=data_digest(prompts),
            prompts=len(prompts),
            n=s.n,
            temperature=s.temperature,
            max_tokens=s.max_tokens,
            verifier=config.verifier.name,
        )

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """What differs from the recipe of a cache, as "key: a there, b here"."""
        here = asdict(self)
        names = [f.name for f in fields(self) if there.get(f.name) != here[f.name]]
        return [f"{_KEYS[name]}: {there.get(name)!r} there, {here[name]!r} here" for name in names]


def model_identity(model_path: str) -> str:
    """A digest of the weights and config.json of a folder; of a hub id, the id and its commit where it is known."""
    path = Path(model_path)
    if not path.is_dir():
        return f"{model_path}@{_hub_commit(model_path)}"
    digest = xxhash.xxh3_128()
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".bin") or p.name == "config.json"]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _hub_commit(model: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent.name
    try:
        return str(HfApi().model_info(model, timeout=15).sha)
    except Exception as error:  # the hub's client raises many kinds; resolve_model has reported those that matter
        log.warning("the commit of %s cannot be told: %s", model, error)
        return "unknown"


def data_digest(prompts: Sequence[Prompt]) -> str:
    """Depends on the prompts' uids, tokens and truths, not on their order."""
    digest = hashlib.sha256()
    for prompt in sorted(prompts, key=lambda p: p.uid):
        truth = json.dumps(prompt.truth, sort_keys=True, default=str)
        digest.update(f"{prompt.uid}\0{truth}\0".encode("utf-8", "surrogatepass"))
        digest.update(np.asarray(prompt.tokens, np.int32).tobytes())
    return digest.hexdigest()[:32]
