"""Where things run: the only code that imports ray, vllm, deepspeed or zmq. Each file hosts the module of its name."""

import os
import sys

if os.path.basename(sys.argv[0] if sys.argv else "") == "default_worker.py":  # noqa: PTH119
    from hapo_async import secrets

    secrets.install()  # a process of Ray's: what it logs lies in Ray's folder

if not os.environ.get("RAY_ADDRESS"):
    # A Ray that we start ourselves stays on loopback. Ray reads this variable when it is imported: with it (and the
    # node address 127.0.0.1) none of its listeners binds a wildcard address. On a cluster that exists it is left alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# A group's header and payload come from one call; where it fails, the header tells, and the payload's copy of the same
# error needs no line of its own.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
