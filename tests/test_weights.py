"""The weight stream: what arrives damaged, twice, late or not at all is noticed and never handed out."""

import numpy as np
import pytest
import torch

from hapo_async.types import Version
from hapo_async.weights import Manifest, Staging, TransferError, pack


def stream(bucket_bytes=64):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.tensor(2.5),
        "big": torch.randn(100),
        "ids": torch.arange(3),
    }
    pieces = list(pack(tensors.items(), bucket_bytes))
    return tensors, Manifest(Version(1, 2), tuple(b for b, _ in pieces)), [d for _, d in pieces]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 10_000])
def test_tensors_survive_the_journey_bit_for_bit_in_any_order(bucket_bytes):
    tensors, manifest, data = stream(bucket_bytes)
    staging = Staging(manifest)
    for index in reversed(range(len(data))):
        staging.put(index, data[index])
    received = dict(staging.commit())
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape
        assert torch.equal(received[name], tensor)


def test_small_tensors_share_a_bucket_and_a_large_one_gets_its_own():
    _, manifest, _ = stream(64)
    assert [[t.name for t in b.tensors] for b in manifest.buckets] == [["a", "b", "c"], ["big"], ["ids"]]
    assert manifest.nbytes == 48 + 10 + 4 + 400 + 24


def test_a_flipped_bit_is_noticed():
    _, manifest, data = stream()
    damaged = data[1].copy()
    damaged[7] ^= 1
    with pytest.raises(TransferError, match="bucket 1: the digest"):
        Staging(manifest).put(1, damaged)


def test_swapped_buckets_are_noticed():
    _, manifest, data = stream()
    with pytest.raises(TransferError):
        Staging(manifest).put(0, data[1])


def test_a_missing_bucket_keeps_the_version_from_being_handed_out():
    _, manifest, data = stream()
    staging = Staging(manifest)
    staging.put(0, data[0])
    with pytest.raises(TransferError, match=r"buckets \[1, 2\] never arrived"):
        staging.commit()


def test_a_bucket_that_is_not_in_the_manifest_is_refused():
    _, manifest, data = stream()
    with pytest.raises(TransferError, match="not in the manifest"):
        Staging(manifest).put(9, data[0])


def test_a_delta_on_another_base_is_refused():
    manifest = Manifest(Version(1, 3), (), kind="delta", base=Version(1, 2))
    with pytest.raises(TransferError, match="based on"):
        Staging(manifest, installed=Version(1, 1))
    Staging(manifest, installed=Version(1, 2))


def test_read_only_memory_from_an_object_store_is_accepted():
    tensors, manifest, data = stream()
    staging = Staging(manifest)
    for index, piece in enumerate(data):
        frozen = np.frombuffer(piece.tobytes(), np.uint8)
        staging.put(index, frozen)
    assert torch.equal(dict(staging.commit())["a"], tensors["a"])
