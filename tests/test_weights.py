"""The weight stream: what arrives damaged, twice, late or not at all is noticed and never handed out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hapo_async.types import Version
from hapo_async.weights import Intake, Manifest, TransferError, pack


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
    intake = Intake(manifest.version)
    for index in reversed(range(len(data))):
        intake.put(manifest.buckets[index], data[index])
    received = dict(intake.commit(manifest))
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype and received[name].shape == tensor.shape
        assert torch.equal(received[name], tensor)


def test_in_place_each_bucket_is_written_once_and_after_it_was_checked():
    tensors, manifest, data = stream()
    written = []
    intake = Intake(manifest.version, write=written.append)
    damaged = data[1].copy()
    damaged[0] ^= 1
    with pytest.raises(TransferError, match="digest"):
        intake.put(manifest.buckets[1], damaged)
    assert written == []
    for bucket, piece in [*zip(manifest.buckets, data, strict=True), (manifest.buckets[0], data[0])]:
        intake.put(bucket, piece)
    assert intake.commit(manifest) == [] and [n for part in written for n, _ in part] == list(tensors)


def test_small_tensors_share_a_bucket_and_a_large_one_gets_its_own():
    _, manifest, _ = stream(64)
    assert [[t.name for t in b.tensors] for b in manifest.buckets] == [["a", "b", "c"], ["big"], ["ids"]]
    assert manifest.nbytes == 48 + 10 + 4 + 400 + 24


def test_a_flipped_bit_is_noticed():
    _, manifest, data = stream()
    damaged = data[1].copy()
    damaged[7] ^= 1
    with pytest.raises(TransferError, match="bucket 1: the digest"):
        Intake(manifest.version).put(manifest.buckets[1], damaged)


def test_swapped_buckets_are_noticed():
    _, manifest, data = stream()
    with pytest.raises(TransferError):
        Intake(manifest.version).put(manifest.buckets[0], data[1])


def test_a_header_whose_tensors_are_not_its_bytes_is_refused():
    _, manifest, data = stream()
    bucket = replace(manifest.buckets[0], tensors=manifest.buckets[0].tensors[:-1])
    with pytest.raises(TransferError, match="bucket 0: its tensors take 58 bytes, its header says 62"):
        Intake(manifest.version).put(bucket, data[0])


def test_two_buckets_with_one_number_are_noticed():
    _, manifest, data = stream()
    intake = Intake(manifest.version)
    intake.put(manifest.buckets[0], data[0])
    with pytest.raises(TransferError, match=r"bucket 0 of 1\.2 came twice, and not the same"):
        intake.put(replace(manifest.buckets[1], index=0), data[1])


def test_what_is_missing_extra_or_of_another_version_is_never_handed_out():
    _, manifest, data = stream()
    intake = Intake(manifest.version)
    intake.put(manifest.buckets[0], data[0])
    with pytest.raises(TransferError, match=r"buckets \[1, 2\] never arrived"):
        intake.commit(manifest)
    intake.put(manifest.buckets[1], data[1])
    intake.put(manifest.buckets[2], data[2])
    with pytest.raises(TransferError, match="not those of the manifest"):
        intake.commit(replace(manifest, buckets=manifest.buckets[:2]))
    with pytest.raises(TransferError, match=r"the manifest is of full 1\.3; full 1\.2 was expected"):
        intake.commit(replace(manifest, version=Version(1, 3)))
    assert len(intake.commit(manifest)) == 5


def test_a_delta_on_another_base_is_refused():
    with pytest.raises(TransferError, match="based on"):
        Intake(Version(1, 3), "delta", Version(1, 2), installed=Version(1, 1))
    Intake(Version(1, 3), "delta", Version(1, 2), installed=Version(1, 2))


def test_read_only_memory_from_an_object_store_is_accepted():
    tensors, manifest, data = stream()
    intake = Intake(manifest.version)
    for bucket, piece in zip(manifest.buckets, data, strict=True):
        intake.put(bucket, np.frombuffer(piece.tobytes(), np.uint8))
    assert torch.equal(dict(intake.commit(manifest))["a"], tensors["a"])
