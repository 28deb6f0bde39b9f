"""hapo_async: asynchronous reinforcement learning from verifiable rewards with Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
