"""A checksum that a GPU computes where the bytes lie: exact integer sums, the same on every device.

The bytes are taken as little-endian int32 words in rows of ROW; row r, place p holds w[r, p], zero past the end. The two
halves of the checksum are sum_r m[r] * sum_p w[r, p] * a[p] modulo 2^64, with odd pseudo-random weights m and a of their own
each: any one changed word changes both, as moved words do. Sums of integers do not depend on their order.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

METHOD = "sum128"
ROW = 4096
_SLAB_ROWS = 4096  # rows at a time: 64 MB of bytes, for which the products need 128 MB


def checksum(data: torch.Tensor) -> str:
    """Of uint8 [N], as "sum128:" and 32 hexadecimal digits."""
    whole = len(data) - len(data) % (4 * ROW)
    tail = torch.zeros(4 * ROW, dtype=torch.uint8, device=data.device)
    tail[: len(data) - whole] = data[whole:]
    rows = [part.view(torch.int32).view(-1, ROW) for part in (_aligned(data[:whole]), tail)]
    halves = []
    for half in (0, 1):
        sums = torch.cat([_row_sums(part, _weights(2 * half, ROW, str(data.device))) for part in rows])
        halves.append((sums * _weights(2 * half + 1, len(sums), str(data.device))).sum())
    return METHOD + ":" + "".join(f"{value % 2**64:016x}" for value in torch.stack(halves).tolist())


def _row_sums(words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """int64 [rows] of int32 [rows, ROW]. int64 products and sums wrap."""
    slabs = [(slab.to(torch.int64) * weights).sum(dim=1) for slab in words.split(_SLAB_ROWS) if len(slab)]
    return torch.cat(slabs) if slabs else torch.zeros(0, dtype=torch.int64, device=words.device)


def _aligned(data: torch.Tensor) -> torch.Tensor:
    return data.clone() if data.data_ptr() % 4 else data


@functools.lru_cache(maxsize=64)
def _weights(stream: int, count: int, device: str) -> torch.Tensor:
    """int64 [count] of odd numbers: the first of one of four streams, by SplitMix64."""
    with np.errstate(over="ignore"):
        x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)
