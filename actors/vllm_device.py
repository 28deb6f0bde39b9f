"""Weights that arrive in vLLM's own processes, on their devices: what a generator asks of them, and what they do.

    generator (WorkerReceiver)                    each process of vLLM (Arrivals), a member of the collective
    stage(offer) ------- begin_receive -------->  a thread receives a second copy and checks it; sampling goes on
                 <------ receive_state --------
    install      ------- update {staged} ------>  loads the copy while paused
    in place     ------- update {offer} ------->  receives while paused, each bucket straight into the model

vLLM's own NCCL engine would pickle what it meets over, knows no deadline and checks nothing, so only its loading is used.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hapo_async.types import Version
from hapo_async.weights import Bucket, Data, Intake, Manifest, TransferError

POLL_S = 0.05
GRACE_S = 5.0  # the processes keep the deadline themselves; this is for one that cannot answer

Tensors = list[tuple[str, torch.Tensor]]


class WorkerReceiver:
    """Stands where a ``Receiver`` would, in the generator. width: how many processes vLLM has."""

    def __init__(self, width: int) -> None:
        self.key = secrets.token_hex(8) + (f"x{width}" if width > 1 else "")
        self._cancelled = False

    def request(self, offer: Any, deadline: float) -> dict[str, Any]:
        """What the processes need, as plain data."""
        from actors.transports import wire

        return {
            "transport": offer.transport,
            "version": str(offer.version),
            "kind": offer.kind,
            "manifest": wire.encode_manifest(offer.manifest) if offer.manifest is not None else None,
            "detail": dict(offer.detail),
            "key": self.key,
            "seconds": max(0.1, deadline - time.monotonic()),
        }

    async def stage(self, llm: Any, offer: Any, deadline: float) -> Manifest:
        """Has every process fetch a version beside serving. Raises TransferError, and vLLM's errors when it died."""
        self._cancelled = False
        await llm.collective_rpc("begin_receive", args=(self.request(offer, deadline),))
        try:
            while (manifest := await arrived(llm)) is None:
                if self._cancelled or time.monotonic() > deadline + GRACE_S:
                    raise TransferError(f"version {offer.version} was given up")
                await asyncio.sleep(POLL_S)
        except TransferError:
            await llm.collective_rpc("cancel_receive")
            raise
        return manifest

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self.cancel()


async def arrived(llm: Any) -> Manifest | None:
    """The version that all processes have; None while one still receives. Raises TransferError when one failed."""
    from actors.transports import wire

    states = await llm.collective_rpc("receive_state")
    for state in states:
        if state["error"]:
            raise TransferError(state["error"])
    if any(state["manifest"] is None for state in states):
        return None
    manifests = [wire.decode_manifest(state["manifest"]) for state in states]
    if any(manifest != manifests[0] for manifest in manifests):
        raise TransferError("vLLM's processes received different versions")
    return manifests[0]


class Arrivals:
    """In one of vLLM's processes. rank: its number among them. device: where its model lives."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._receivers: dict[tuple[str, str], Any] = {}
        self._thread: threading.Thread | None = None
        self._staged: tuple[Version, Tensors] | None = None
        self._manifest: bytes | None = None
        self._error = ""

    def begin(self, request: Mapping[str, Any]) -> None:
        """Starts to receive into a second copy."""
        self.cancel()
        self._staged = None
        self._thread = threading.Thread(target=self._stage, args=(request,), name="weights", daemon=True)
        self._manifest, self._error = None, ""
        self._thread.start()

    def state(self) -> dict[str, Any]:
        """manifest: of the version that arrived whole, encoded. error: why it did not."""
        return {"manifest": self._manifest, "error": self._error}

    def cancel(self) -> None:
        """Gives up what is under way; it ends soon, and is waited for."""
        for receiver in self._receivers.values():
            receiver.cancel()
        if self._thread is not None:
            self._thread.join(GRACE_S)
            if self._thread.is_alive():
                raise RuntimeError("a weight transfer that was cancelled has not ended")
            self._thread = None

    def take(self, version: Version) -> Tensors:
        """The second copy, once. Raises TransferError when there is none of this version."""
        staged, self._staged = self._staged, None
        if staged is None or staged[0] != version:
            raise TransferError(f"version {version} has not been staged in this process")
        if self._device.type == "cuda":
            for _, tensor in staged[1]:  # allocated on another stream than the one that reads it
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return staged[1]

    def pour(self, request: Mapping[str, Any], write: Callable[[Tensors], Any]) -> None:
        """Receives a version and hands each bucket's tensors to ``write``. Raises TransferError."""
        self.cancel()
        self._manifest, self._error = None, ""
        intake = Intake(Version.parse(request["version"]), request["kind"], write=write)
        manifest = self._receive(request, intake)
        intake.commit(manifest)
        self._manifest = _encoded(manifest)

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()

    def _stage(self, request: Mapping[str, Any]) -> None:
        """In a thread, imports included: the process goes on sampling."""
        try:
            intake = Intake(Version.parse(request["version"]), request["kind"])
            manifest = self._receive(request, intake)
            self._staged = manifest.version, intake.commit(manifest)
            self._manifest = _encoded(manifest)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"[:1000]

    def _receive(self, request: Mapping[str, Any], intake: Intake) -> Manifest:
        from actors.transports import Offer, wire

        manifest = wire.decode_manifest(request["manifest"]) if request["manifest"] is not None else None
        version, kind = intake.version, intake.kind
        offer = Offer(request["transport"], version, kind, None, manifest, request["detail"])

        def put(bucket: Bucket, data: Data) -> None:
            intake.put(bucket, data)

        receiver = self._receiver(request["transport"], request["key"])
        received: Manifest = receiver.receive(offer, time.monotonic() + request["seconds"], put)
        return received

    def _receiver(self, transport: str, key: str) -> Any:
        """One for each transport and key, kept with its place in the epoch."""
        if (transport, key) not in self._receivers:
            from actors.transports.collective import CollectiveReceiver
            from actors.transports.ipc import IpcReceiver

            if transport == "ipc":
                self._receivers[transport, key] = IpcReceiver(str(self._device))
            else:
                self._receivers[transport, key] = CollectiveReceiver.part(key, self._rank, transport, str(self._device))
        return self._receivers[transport, key]


def _encoded(manifest: Manifest) -> bytes:
    from actors.transports import wire

    return wire.encode_manifest(manifest)
