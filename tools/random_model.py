"""For tools that measure the system and not what it learns: a random model that never ends an answer by itself, prompts of
one length, and a reward that is right half of the time. Answers then have exactly the length that is asked for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

REWARD = "tools.random_model:reward"


def reward(prompt: str, response: str, truth: object) -> float:
    """1 or 0, from the text of the answer alone."""
    return float(zlib.crc32(response.encode()) % 2)


def make(folder: Path, hidden: int = 64, layers: int = 2, head: int = 32, positions: int = 512) -> str:
    """Writes a random Qwen2 over bytes, with its tokenizer. Returns the folder.

    The tokenizer's end-of-text token lies behind the model's vocabulary: no answer can hold it.
    """
    if (folder / "config.json").exists():
        return str(folder)
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(alphabet),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=max(1, hidden // head // 2),
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=None,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def write_prompts(path: Path, prompts: Iterable[tuple[str, str]]) -> str:
    """A JSONL file of (prompt, answer). Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in prompts]
    path.write_text("".join(rows), encoding="utf-8")
    return str(path)
