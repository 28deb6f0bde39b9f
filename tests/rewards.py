"""Reward functions that tests plug in."""


def even(prompt: str, response: str, truth: str) -> float:
    """1 for an answer of even length: a reward that varies within every group, whatever the model can do."""
    return float(len(response) % 2 == 0)
