"""Reward functions that tests plug in."""

import time
from pathlib import Path


def even(prompt: str, response: str, truth: str) -> float:
    """1 for an answer of even length: a reward that varies within every group, whatever the model can do."""
    return float(len(response) % 2 == 0)


def patient(prompt: str, response: str, truth: str) -> float:
    """1, once the file that ``truth`` names is there."""
    while not Path(truth).exists():
        time.sleep(0.01)
    return 1.0
