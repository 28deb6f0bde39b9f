"""What the learner's tests start from: a random model, tasks, and a reference that is another model.

A test module gets them with ``pytest_plugins = ["tests.learner_fixtures"]``. Nobody changes them.
"""

from __future__ import annotations

import pytest

from actors.reference import FrozenReference
from tests import learners, samples_learn
from tests.reference_loop import Task


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Folder of a random model of the shipped one's shape."""
    return samples_learn.random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> FrozenReference:
    return learners.other_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def many_tasks() -> list[Task]:
    return learners.many_tasks()


@pytest.fixture(scope="module")
def steps() -> list[list[Task]]:
    """Five steps of eight prompts."""
    return [samples_learn.tasks(8, 4, seed=step) for step in range(5)]
