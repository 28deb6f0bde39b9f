"""Finding the model and its tokenizer before anything is started."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from hapo_async.data.source import hub_reachable
from hapo_async.errors import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


def resolve_model(model: str) -> str:
    """What transformers and vLLM are given: the folder of builtin:chain or of a local model, or a hub id that exists.

    Raises ConfigError for a missing folder, a folder without a model, and an id that is neither cached nor on the hub;
    takes seconds at most, network or not.
    """
    if model.startswith("builtin:"):
        if model != "builtin:chain":
            raise ConfigError(f"model {model!r} is unknown. The built-in one is builtin:chain.")
        from hapo_async import toy

        return str(toy.MODEL_DIR)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model folder {model!r} holds no config.json. Give a folder written by save_pretrained.")
        _refuse_pickles(path, model)
        return str(path.resolve())
    if path.exists():
        raise ConfigError(f"model {model!r} is a file. Give the folder that holds its config.json.")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"model folder {model!r} does not exist. Give one that does, or a Hugging Face id.")
    _check_hub(model)
    return model


def _refuse_pickles(folder: Path, model: str) -> None:
    """Raises ConfigError for weights that would have to be unpickled."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "training_args.bin")
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"model folder {model!r} holds its weights in {pickled[0]}, which is a pickle: loading it may run code. Convert it "
            "to safetensors, where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)."
        )


def _check_hub(model: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    missing = f"there is no folder {model!r}, and as a Hugging Face id it is not in the local cache"
    if not hub_reachable():
        raise ConfigError(
            f"model {model!r}: {missing}; the hub cannot be reached from here (or HF_HUB_OFFLINE is set). "
            "Check the path, or download the model first."
        )
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(model, timeout=15)
    except Exception as error:  # the hub's client raises many kinds; all mean that the model cannot be had
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {model!r}: {missing}; the hub says: {why[:200]}. Check the name and your access."
        ) from None


def load_tokenizer(model_path: str) -> Any:
    """The model's own tokenizer. Raises ConfigError when it cannot be loaded or has no end-of-text token."""
    resolved = resolve_model(model_path)
    folder = Path(resolved)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        # transformers would make up an empty tokenizer from the model's type
        raise ConfigError(
            f"model folder {model_path!r} holds no tokenizer. Save one there with tokenizer.save_pretrained({model_path!r})."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, all of which mean: no usable tokenizer here
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the tokenizer of model {model_path!r} cannot be loaded: {why[:300]}. Save one next to the model with "
            "tokenizer.save_pretrained."
        ) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of model {model_path!r} has no end-of-text token, so no answer could end. Set eos_token "
            "in its tokenizer_config.json."
        )
    return tokenizer


def context_tokens(model: str) -> int:
    """Most positions, prompt and answer together, that the model was made for (``max_position_embeddings``); a very
    large number where its config does not say."""
    from huggingface_hub import try_to_load_from_cache

    unlimited = 1 << 30
    resolved = resolve_model(model)
    cached = (
        str(Path(resolved) / "config.json")
        if Path(resolved).is_dir()
        else try_to_load_from_cache(resolved, "config.json")
    )
    if not isinstance(cached, str):
        return unlimited
    tree = json.loads(Path(cached).read_text(encoding="utf-8"))
    value = tree.get("max_position_embeddings") or (tree.get("text_config") or {}).get("max_position_embeddings")
    return int(value) if value else unlimited
