"""Where things run: the only code that imports ray, vllm, deepspeed or zmq. Each file hosts the module of its name."""
