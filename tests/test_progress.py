"""What a busy process says of itself changes while it gets on, and only then."""

from __future__ import annotations

import os
import threading

import torch

from hapo_async.learner.policy import load_policy
from hapo_async.learner.progress import Progress
from tests import samples_learn


def test_what_is_done_is_told_from_another_thread_and_nested_work_returns_to_the_outer_one():
    progress, told = Progress(), []

    def read() -> dict:
        thread = threading.Thread(target=lambda: told.append(progress.read()))
        thread.start()
        thread.join()
        return told[-1]

    idle = read()
    assert (idle["doing"], idle["pid"]) == ("", os.getpid()) and read()["moved"] == idle["moved"]
    with progress.during("step"):
        assert read()["doing"] == "step" and read()["doing_s"] < 60
        with progress.during("fetch"):
            assert read()["doing"] == "fetch"
        before = read()
        assert before["doing"] == "step"
        progress.move()
        assert read()["moved"] != before["moved"]
    assert read()["doing"] == "" and read()["moved"] != idle["moved"]


def test_every_layer_that_a_model_computes_is_counted(chain_model):
    policy = load_policy(chain_model, samples_learn.config(chain_model), dtype=torch.float32, device="cpu")
    progress = Progress()
    progress.watch(policy.model)
    with torch.no_grad():
        policy.model(torch.zeros((1, 3), dtype=torch.long))
    assert progress.moves == policy.model.config.num_hidden_layers > 1


def test_files_that_are_loaded_or_saved_beside_count_and_other_writing_does_not(tmp_path):
    progress = Progress()

    def write() -> bool:
        before = progress.read()["moved"]
        (tmp_path / "big").write_bytes(bytes(3 << 20))
        return progress.read()["moved"] != before

    with progress.during("load"):
        assert write()
    with progress.during("step"), progress.beside():
        assert write()
    with progress.during("step"):
        assert not write()
