"""The checksum that GPUs compute: equal to its definition, and different for every kind of damage."""

import numpy as np
import pytest
import torch

from hapo_async import checksum as module
from hapo_async.checksum import ROW, checksum
from hapo_async.types import Version
from hapo_async.weights import Bucket, Intake, Manifest, TransferError, pack

MASK = 2**64 - 1


def weight(stream: int, index: int) -> int:
    """SplitMix64, made odd."""
    x = (index + 1 + (stream << 40)) * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return (x ^ (x >> 31)) | 1


def by_definition(raw: bytes) -> str:
    rows = len(raw) // (4 * ROW) + 1
    words = np.frombuffer(raw + bytes(4 * ROW * rows - len(raw)), "<i4").reshape(rows, ROW)
    halves = []
    for stream in (0, 2):
        sums = [sum(int(w) * weight(stream, p) for p, w in enumerate(row) if w) for row in words]
        halves.append(sum(s * weight(stream + 1, r) for r, s in enumerate(sums)) & MASK)
    return "sum128:" + "".join(f"{h:016x}" for h in halves)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 1000, 4 * ROW - 1, 4 * ROW, 4 * ROW + 1, 12 * ROW + 7])
def test_it_is_what_its_definition_says(count):
    data = noise(count)
    assert checksum(data) == by_definition(data.numpy().tobytes())


def test_slabs_and_alignment_make_no_difference(monkeypatch):
    data = noise(50 * ROW + 5)
    expected = checksum(data)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
    assert shifted.data_ptr() % 4 and checksum(shifted) == expected
    monkeypatch.setattr(module, "_SLAB_ROWS", 3)
    assert checksum(data) == expected


def test_every_single_changed_bit_and_every_exchange_shows():
    data = noise(9 * ROW)
    seen = {checksum(data)}
    for place in (0, 1, 4 * ROW - 1, 4 * ROW, 9 * ROW - 1):
        for bit in range(8):
            other = data.clone()
            other[place] ^= 1 << bit
            seen.add(checksum(other))
    blocks = data[: 8 * ROW].view(2, 4 * ROW)
    seen.add(checksum(torch.cat([blocks.flip(0).reshape(-1), data[8 * ROW :]])))  # two rows
    words = data[: 4 * ROW].view(torch.int32)
    seen.add(checksum(torch.cat([words.flip(0).view(torch.uint8), data[4 * ROW :]])))  # the words of one
    seen.add(checksum(torch.cat([data[4:], data[:4]])))  # all moved on by one
    assert len(seen) == 1 + 5 * 8 + 3


def test_buckets_that_stay_on_their_device_carry_it_and_any_receiver_checks_it():
    tensors = {"a": torch.randn(100), "b": torch.randn(3).bfloat16(), "c": torch.arange(7)}
    pieces = list(pack(tensors.items(), 300, on_device=True))
    manifest = Manifest(Version(1, 1), tuple(b for b, _ in pieces))
    assert all(b.digest.startswith("sum128:") and isinstance(d, torch.Tensor) for b, d in pieces)
    for as_received in (lambda d: d, lambda d: d.numpy()):
        intake = Intake(manifest.version)
        for bucket, data in pieces:
            intake.put(bucket, as_received(data))
        received = dict(intake.commit(manifest))
        assert all(torch.equal(received[n], t) and received[n].dtype == t.dtype for n, t in tensors.items())
    bucket, data = pieces[0]
    data = data.clone()
    data[5] ^= 1
    with pytest.raises(TransferError, match="bucket 0: the digest"):
        Intake(manifest.version).put(bucket, data)


def test_a_digest_of_host_memory_is_checked_on_a_tensor_too():
    (bucket, data), *_ = pack({"a": torch.randn(10)}.items(), 100)
    assert isinstance(data, np.ndarray) and ":" not in bucket.digest
    Intake(Version(1, 1)).put(bucket, torch.from_numpy(data))
    with pytest.raises(TransferError, match="digest"):
        Intake(Version(1, 1)).put(Bucket(0, bucket.tensors, 40, "0" * 32), torch.from_numpy(data))
