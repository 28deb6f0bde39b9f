"""The shared-column cache: sequences end at the cursor, rows stay compact, nothing is lost when it grows."""

from __future__ import annotations

import torch

from hapo_async.slot_cache import SlotCache


def cache_with(lengths: list[int]) -> tuple[SlotCache, list[torch.Tensor]]:
    """A one-layer cache (one head of size 2) that holds one sequence per row; returns what each row must contain."""
    cache = SlotCache(1, torch.device("cpu"), torch.float32)
    content = []
    for row, length in enumerate(lengths):
        cache.reserve(row + 1, length)
        cache.first = min(cache.first, cache.cursor - length)
        cache.filling = True
        keys = torch.randn(1, 1, length, 2)
        cache.update(keys, 2 * keys, 0)
        cache.filling = False
        cache.place(row, row + 1, 0, length)
        content.append(keys[0, 0])
    return cache, content


def check(cache: SlotCache, content: list[torch.Tensor]) -> None:
    layer = cache.slots[0]
    for row, keys in enumerate(content):
        held = slice(cache.cursor - len(keys), cache.cursor)
        assert torch.equal(layer.keys[row, 0, held], keys)
        assert torch.equal(layer.values[row, 0, held], 2 * keys)
        mask = cache.window(len(content))[row, 0, 0]
        assert (mask == 0).sum() == len(keys) + 1  # its own tokens and the one that comes
        assert torch.isinf(mask[: len(mask) - len(keys) - 1]).all()


def test_rows_of_any_length_end_at_the_cursor():
    check(*cache_with([3, 1, 90, 2, 500, 7]))


def test_a_step_appends_to_all_rows_and_sees_the_window():
    cache, content = cache_with([3, 5])
    new = torch.randn(2, 1, 1, 2)
    keys, values = cache.update(new, 2 * new, 0)
    cache.cursor += 1
    assert keys.shape == values.shape == (2, 1, 6, 2)
    check(cache, [torch.cat([old, new[row, 0]]) for row, old in enumerate(content)])


def test_growing_in_rows_and_columns_keeps_the_content():
    cache, content = cache_with([3, 40])
    cache.reserve(100, 0)
    check(cache, content)
    cache.reserve(2, 3000)
    assert cache.row_capacity >= 100 and cache.cursor >= 3000 > cache.cursor - cache.first
    check(cache, content)


def test_it_moves_when_the_last_column_is_used_up():
    cache, content = cache_with([3])
    for _ in range(1000):
        cache.reserve(1, 0)
        new = torch.randn(1, 1, 1, 2)
        cache.update(new, 2 * new, 0)
        cache.cursor += 1
        content = [torch.cat([content[0], new[0, 0]])]
    check(cache, content)
    assert cache.column_capacity < 4 * len(content[0])


def test_a_row_takes_the_place_of_another_and_old_columns_are_given_up():
    cache, content = cache_with([9, 4, 2])
    cache.move_row(2, 0)
    cache.trim(4)
    check(cache, [content[2], content[1]])
    assert cache.cursor - cache.first == 4
    cache.trim(0)
    assert cache.cursor == cache.first == 0
