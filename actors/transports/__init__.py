"""How weights travel from rank 0 of the learner to the generators: one module per transport, behind ``base``.

ray    buckets in the object store, fetched by whoever wants them
zmq    buckets in rank 0's memory, fetched over encrypted sockets
gloo   a broadcast per bucket on CPUs, in lockstep
nccl   the same on GPUs
ipc    handles to memory of the same GPU
"""

from __future__ import annotations

from actors.transports.base import Data, Member, Offer, Published, Put, Receiver, Sender
from actors.transports.object_store import RayReceiver, RaySender

__all__ = ["Data", "Member", "Offer", "Published", "Put", "Receiver", "Sender", "receiver", "sender"]


def sender(transport: str, device: str, address: str, deadline_s: float) -> Sender:
    """The learner's end. device: "cpu" | "cuda". address: of this process's node, the only one that sockets are bound to."""
    if transport == "zmq":
        from actors.transports.zmq_stream import ZmqSender

        return ZmqSender(address, deadline_s)
    if transport in ("gloo", "nccl"):
        from actors.transports.collective import CollectiveSender

        return CollectiveSender(transport, address, device, deadline_s)
    if transport == "ipc":
        from actors.transports.ipc import IpcSender

        return IpcSender(address, deadline_s)
    return RaySender()


def receiver(transport: str, device: str, address: str) -> Receiver:
    """A generator's end."""
    if transport == "zmq":
        from actors.transports.zmq_stream import ZmqReceiver

        return ZmqReceiver()
    if transport in ("gloo", "nccl"):
        from actors.transports.collective import CollectiveReceiver

        return CollectiveReceiver(transport, address, device)
    if transport == "ipc":
        from actors.transports.ipc import IpcReceiver

        return IpcReceiver()
    return RayReceiver()
