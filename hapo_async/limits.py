"""How long a sequence may be for a model whose keys and values the transformers engine keeps itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hapo_async.slot_cache import sliding_window


@dataclass(frozen=True)
class Limits:
    """positions: those that the model knows. window: of its sliding attention. None: no limit."""

    positions: int | None
    window: int | None

    @classmethod
    def of(cls, config: Any) -> Limits:
        """config: of the text model."""
        return cls(getattr(config, "max_position_embeddings", None), sliding_window(config))

    def check(self, what: str, prompt: int, tokens: int) -> None:
        """Raises ValueError for an empty prompt, and for more tokens than the model can take."""
        if not prompt:
            raise ValueError(f"{what}: the prompt is empty; the first token needs something to follow")
        if self.positions and prompt + tokens > self.positions:
            raise ValueError(
                f"{what}: {prompt} prompt tokens and {tokens} new ones exceed the model's {self.positions} positions. "
                "Lower data.max_prompt_tokens or sampling.max_tokens."
            )
        if self.window and prompt + tokens > self.window:
            raise ValueError(
                f"{what}: {prompt + tokens} tokens exceed the model's sliding attention window of {self.window}, which the "
                "transformers engine does not implement. Use generator.engine=vllm or fewer sampling.max_tokens."
            )
