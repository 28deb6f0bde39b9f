"""The KV cache of the transformers engine: rows that come and go while one shared column grows.

All running sequences write their next key and value into the same column ``cursor``; a sequence with L cached tokens
occupies columns [cursor - L, cursor) of its row. A decode step therefore writes one slice and attends to one view, and a
new sequence joins between two steps by being placed so that it ends at the cursor. Rows stay compact: the last row
moves into the place of one that leaves. Rotary keys are stored already rotated, so columns say nothing about positions.

Shapes: R rows, C columns, H key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "hapo_async_sdpa"
_HEADROOM = 128  # columns kept free in front of the cursor after a move: a move then costs little per step


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """sdpa whose single-token step reads grouped keys and values in place.

    The library's own function copies K and V once per query head of a group when a mask is given. For one query token
    the heads of a group can be the query positions of their key-value head instead: [R, H*g, 1, D] -> [R, H, g, D].
    """
    rows, heads, length, size = query.shape
    if length != 1 or attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Layer(CacheLayerMixin):
    """One layer. ``owner.filling`` decides whether update() captures a prefill or extends the running rows."""

    keys: torch.Tensor  # type: ignore[assignment]  # [rows, H, columns, D], from the first forward on
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner
        self.fresh: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values of the last prefill

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros((self.owner.row_capacity, like.shape[1], self.owner.column_capacity, like.shape[3]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        owner = self.owner
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if owner.filling:
            self.fresh = (key_states, value_states)
            return key_states, value_states
        rows, column = key_states.shape[0], owner.cursor
        self.keys[:rows, :, column : column + 1] = key_states
        self.values[:rows, :, column : column + 1] = value_states
        return self.keys[:rows, :, owner.first : column + 1], self.values[:rows, :, owner.first : column + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.owner.filling else self.owner.cursor - self.owner.first

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Keys and values of all running rows, and the additive attention mask [R, 1, 1, C] that belongs to them.

    cursor: the column that the next token of every row is written to. first: the oldest column that any row needs.
    """

    def __init__(self, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self.row_capacity, self.column_capacity = 16, 2 * _HEADROOM
        self.cursor = self.first = 0
        self.filling = False
        self.mask = torch.zeros((self.row_capacity, 1, 1, self.column_capacity), device=device, dtype=dtype)
        self.slots = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=list(self.slots))

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for ``rows`` rows in all, for a sequence of ``length`` cached tokens, and for the next column."""
        width = max(length, self.cursor - self.first)
        if rows <= self.row_capacity and length <= self.cursor < self.column_capacity:
            return
        row_capacity = self.row_capacity
        while row_capacity < rows:
            row_capacity *= 2
        # Twice the width: a running sequence that doubles its length is copied once.
        self._move(row_capacity, width, max(width + _HEADROOM, 2 * width))

    def _move(self, row_capacity: int, cursor: int, column_capacity: int) -> None:
        used = slice(self.first, self.cursor)
        shift = cursor - self.cursor
        kept = min(self.row_capacity, row_capacity)
        self.row_capacity, self.column_capacity = row_capacity, column_capacity
        for layer in self.slots:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = old.new_zeros((row_capacity, old.shape[1], column_capacity, old.shape[3]))
                    new[:kept, :, used.start + shift : cursor] = old[:kept, :, used]
                    setattr(layer, name, new)
        # Columns right of the cursor are open for every row; those left of a row's start are closed.
        mask = self.mask.new_zeros((row_capacity, 1, 1, column_capacity))
        mask[..., : used.start + shift] = -torch.inf
        mask[:kept, ..., used.start + shift : cursor] = self.mask[:kept, ..., used]
        self.mask, self.cursor, self.first = mask, cursor, used.start + shift

    def place(self, row: int, end: int, index: int, length: int) -> None:
        """Rows [row, end) become copies of sequence ``index`` of the last prefill, of ``length`` tokens."""
        start = self.cursor - length
        self.mask[row:end, ..., :start] = -torch.inf
        self.mask[row:end, ..., start:] = 0
        if length:
            for layer in self.slots:
                assert layer.fresh is not None
                keys, values = layer.fresh
                layer.keys[row:end, :, start : self.cursor] = keys[index, :, :length]
                layer.values[row:end, :, start : self.cursor] = values[index, :, :length]

    def forget_prefill(self) -> None:
        for layer in self.slots:
            layer.fresh = None

    def move_row(self, source: int, target: int) -> None:
        """Row ``target`` becomes what row ``source`` is."""
        used = slice(self.first, self.cursor)
        self.mask[target] = self.mask[source]
        for layer in self.slots:
            layer.keys[target, :, used] = layer.keys[source, :, used]
            layer.values[target, :, used] = layer.values[source, :, used]

    def trim(self, longest: int) -> None:
        """The longest running row holds ``longest`` tokens: older columns are needed no more; 0 empties the cache."""
        if longest == 0:
            self.cursor = 0
        self.first = self.cursor - longest

    def window(self, rows: int) -> torch.Tensor:
        """Additive mask [rows, 1, 1, cursor + 1 - first] of the coming decode step."""
        return self.mask[:rows, ..., self.first : self.cursor + 1]


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


def sliding_window(config: Any) -> int | None:
    """The attention window, when some layer has one."""
    types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    return window if window and (not types or any("sliding" in t for t in types)) else None


def prefill_batches(
    fills: list[tuple[np.ndarray, int, int]], tokens: int
) -> Iterable[list[tuple[np.ndarray, int, int]]]:
    """Consecutive runs of length-sorted sequences whose padded size stays within ``tokens``."""
    batch: list[tuple[np.ndarray, int, int]] = []
    for fill in fills:
        if batch and (len(batch) + 1) * len(fill[0]) > tokens:
            yield batch
            batch = []
        batch.append(fill)
    yield batch
