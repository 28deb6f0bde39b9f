"""What only a GPU can show: that weights arrive through NCCL and CUDA IPC, in processes of their own and in vLLM's, and that a
small run trains. Prints one JSON object; exit code 1 when a check failed.

    python tools/gpu_check.py                # all, about five minutes
    python tools/gpu_check.py digest ipc     # some

Each check runs in a process of its own and has a deadline. Without a CUDA device all are skipped, and say so.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.transports.base import Member, Receiver, Sender
from hapo_async.checksum import checksum
from hapo_async.types import Version
from hapo_async.weights import Bucket, Data, Intake, Manifest, TransferError, pack

ROOT = Path(__file__).resolve().parents[1]
CHECK_S = 600.0
DEADLINE_S = 60.0
BUCKET_BYTES = 32 << 20
NEARER = 10
"""By so much log-probs must be nearer to those of the same bfloat16 weights than to those of the version before."""


class Skip(Exception):
    """Why a check does not apply here."""


# --------------------------------------------------------------------------------------------------------------------
# The checks: each returns what it measured, or raises


def digest() -> dict[str, float]:
    """The checksum of a GPU is that of the host."""
    for count in (0, 5, 16384, 1_000_003):
        data = torch.randint(256, (count,), dtype=torch.uint8)
        assert checksum(data.cuda()) == checksum(data), f"{count} bytes"
    data = torch.randint(256, (256 << 20,), dtype=torch.uint8, device="cuda")
    checksum(data)
    torch.cuda.synchronize()
    began = time.perf_counter()
    checksum(data)
    return {"gigabytes_per_s": data.nbytes / (time.perf_counter() - began) / 1e9}


def ipc() -> dict[str, float]:
    """Two processes on one GPU."""
    return _between_processes("ipc", "cuda:0")


def nccl() -> dict[str, float]:
    """Two processes on two GPUs; then the receiver is killed."""
    _need_gpus(2)
    return _between_processes("nccl", "cuda:1", is_killed=True)


def vllm_ipc() -> dict[str, float]:
    """vLLM on the learner's GPU."""
    return _into_vllm("ipc", "cuda")


def vllm_nccl() -> dict[str, float]:
    """vLLM on another GPU."""
    _need_gpus(2)
    torch.zeros(1, device="cuda:0")  # this process has its GPU; those that it starts see the other
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    return _into_vllm("nccl", "cuda")


def train() -> dict[str, float]:
    """A few steps on one GPU that learner and generator share."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["generator.placement=colocated", "max_staleness=0", "train.steps=3", "eval.every=0"]
        command = [
            sys.executable,
            "-m",
            "hapo_async",
            "train",
            "configs/quickstart.yaml",
            f"run.dir={folder}",
            *overrides,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHECK_S, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        rows = [json.loads(line) for path in Path(folder).rglob("metrics.jsonl") for line in path.open()]
    losses = [row["loss/value"] for row in rows if "loss/value" in row]
    assert len(losses) == 3 and np.isfinite(losses).all(), f"losses {losses}"
    return {"steps": len(losses)}


CHECKS: dict[str, Callable[[], dict[str, float]]] = {
    check.__name__: check for check in (digest, ipc, nccl, vllm_ipc, vllm_nccl, train)
}


def _need_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        raise Skip(f"needs {count} GPUs; this machine has {torch.cuda.device_count()}")


# --------------------------------------------------------------------------------------------------------------------
# Between two processes


def _between_processes(
    transport: str, device: str, is_killed: bool = False, source: str = "cuda:0"
) -> dict[str, float]:
    """Three versions of 256 MB, bit for bit. device: the receiver's. source: the sender's."""
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_receive, args=(theirs, transport, device), daemon=True
    )
    process.start()
    sender, member = _sender(transport), Member("receiver", _hear(pipe))
    tensors = {f"p{i}": torch.randn(1 << 22, device=source) for i in range(16)}
    seconds = []
    try:
        for step in (1, 2, 3):
            for tensor in tensors.values():
                tensor.add_(1)
            began = time.perf_counter()
            _publish(sender, Version(1, step), tensors, member, lambda offer: pipe.send(offer))
            arrived = _hear(pipe)
            seconds.append(time.perf_counter() - began)
            assert arrived == _checksums(tensors), f"version {step} arrived as something else: {arrived}"
        noticed = _killed(sender, member, process, tensors) if is_killed else {}
    finally:
        sender.close()
        process.kill()
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return {"gigabytes_per_s": nbytes / min(seconds) / 1e9, **noticed}


def _killed(sender: Sender, member: Member, process: Any, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a receiver costs that dies after it has joined: seconds until the sender knows."""
    process.kill()
    process.join()
    began = time.perf_counter()
    offer = sender.announce(Version(1, 4), "full", [member])
    assert offer is not None and offer.members == (), "a dead process was still offered a version"
    _publish(sender, Version(1, 5), tensors, member, lambda offer: None)
    return {"death_noticed_s": time.perf_counter() - began}


def _receive(pipe: Any, transport: str, device: str) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)
    receiver = _receiver(transport, device)
    pipe.send(receiver.key)
    while True:
        offer = pipe.recv()
        intake = Intake(offer.version)

        def put(bucket: Bucket, data: Data, intake: Intake = intake) -> None:
            assert torch.as_tensor(data).device == torch.device(device)
            intake.put(bucket, data)

        try:
            manifest = receiver.receive(offer, time.monotonic() + DEADLINE_S, put)
            pipe.send(_checksums(dict(intake.commit(manifest))))
        except TransferError as error:
            pipe.send(str(error))


def _checksums(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: checksum(tensor.view(torch.uint8)) for name, tensor in tensors.items()}


def _hear(pipe: Any) -> Any:
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError("the other process says nothing")
    return pipe.recv()


def _sender(transport: str) -> Sender:
    from actors import transports

    return transports.sender(transport, "cpu" if transport == "gloo" else "cuda", "127.0.0.1", DEADLINE_S)


def _receiver(transport: str, device: str) -> Receiver:
    if transport == "ipc":
        from actors.transports.ipc import IpcReceiver

        return IpcReceiver(device)
    from actors.transports.collective import CollectiveReceiver

    return CollectiveReceiver(transport, "127.0.0.1", device)


def _publish(
    sender: Sender, version: Version, tensors: dict[str, torch.Tensor], member: Member, tell: Callable[[Any], Any]
) -> None:
    """tell: gets the offer as soon as there is one."""
    early = sender.announce(version, "full", [member])
    if early is not None:
        tell(early)
    sender.begin(version, "full")
    buckets = []
    for bucket, data in pack(tensors.items(), BUCKET_BYTES, sender.on_device):
        sender.send(bucket, data)
        buckets.append(bucket)
    offer = sender.commit(Manifest(version, tuple(buckets)))
    if early is None:
        tell(offer)


# --------------------------------------------------------------------------------------------------------------------
# Into vLLM's own processes


def _into_vllm(transport: str, device: str) -> dict[str, float]:
    """A version staged beside serving and one in place: what is scored then are their log-probs."""
    from actors import vllm_engine

    if not vllm_engine.is_installed():
        raise Skip("vllm is not installed")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    return asyncio.run(_serve(transport, device))


async def _serve(transport: str, device: str) -> dict[str, float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actors import vllm_engine
    from actors.vllm_device import WorkerReceiver
    from hapo_async import config
    from tools import random_model

    with tempfile.TemporaryDirectory() as folder:
        path = random_model.make(Path(folder) / "model", hidden=256, head=64)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.to(device)
        settings: dict[str, Any] = {"generator": {"engine": "vllm", "dtype": "bfloat16"}}
        if device == "cuda":
            settings["vllm"] = {"gpu_memory_utilization": 0.3, "enforce_eager": True}
        tokenizer = AutoTokenizer.from_pretrained(path)
        engine = await vllm_engine.start(config.parse(settings), path, tokenizer, device, "check")
    sender, receiver = _sender(transport), WorkerReceiver(1)
    found: dict[str, float] = {}
    try:
        for step, is_staged in enumerate((True, True, False), start=1):
            version, before = Version(1, step), _logp(model, device)
            _move(model, step)
            pause_s = await _update(engine, sender, receiver, version, dict(model.named_parameters()), is_staged)
            served, (scored,) = await engine.score([_SAID])
            error, distance = np.abs(scored - _logp(model, device)).max(), np.abs(scored - before).max()
            assert served == version and NEARER * error < distance, f"{version}: {error=}, {distance=}"
            found["staged_pause_s" if is_staged else "in_place_pause_s"] = pause_s
    finally:
        sender.close()
        await engine.close()
    return found


async def _update(
    engine: Any, sender: Sender, receiver: Any, version: Version, tensors: dict[str, torch.Tensor], is_staged: bool
) -> float:
    loop, offered = asyncio.get_running_loop(), asyncio.Event()
    offers: list[Any] = []

    def tell(offer: Any) -> None:
        offers.append(offer)
        loop.call_soon_threadsafe(offered.set)

    sending = asyncio.create_task(
        asyncio.to_thread(_publish, sender, version, tensors, Member("check", receiver.key), tell)
    )
    await asyncio.wait_for(offered.wait(), DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    if is_staged:
        manifest = await engine.receive_on_device(receiver, offers[0], deadline)
        pause_s = await engine.install_received(manifest)
    else:
        _, pause_s = await engine.receive_in_place(receiver, offers[0], deadline)
    await sending
    return float(pause_s)


_SAID = (np.arange(5, 15, dtype=np.int32), np.arange(20, 40, dtype=np.int32))


def _logp(model: Any, device: str) -> np.ndarray:
    """float32 [T] of the answer in ``_SAID``."""
    start = len(_SAID[0])
    tokens = torch.tensor(np.concatenate(_SAID), dtype=torch.int64, device=device)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, start - 1 : -1].float()
    picked = logits.log_softmax(-1).gather(1, tokens[start:, None])[:, 0]
    return picked.cpu().numpy()


def _move(model: Any, seed: int) -> None:
    """Far enough to tell any two versions apart."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


# --------------------------------------------------------------------------------------------------------------------
# Running them


def run(names: list[str]) -> dict[str, Any]:
    """{device, torch, checks: {name: {status: pass | fail | skipped, seconds, ...}}}."""
    has_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if has_gpu else None,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "checks": {},
    }
    for name in names:
        found["checks"][name] = _guarded(name) if has_gpu else {"status": "skipped", "reason": "no CUDA device"}
        print(f"{name}: {found['checks'][name]}", file=sys.stderr, flush=True)
    return found


def _guarded(name: str) -> dict[str, Any]:
    """One check in a process of its own."""
    began = time.monotonic()
    command = [sys.executable, "-m", "tools.gpu_check", "--one", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHECK_S, check=False)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        answer = {"status": "fail", "reason": f"not done within {CHECK_S:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        answer = {"status": "fail", "reason": f"it died ({done.returncode}): {done.stderr[-1500:]}"}
    return {**answer, "seconds": round(time.monotonic() - began, 1)}


def _one(name: str) -> dict[str, Any]:
    try:
        return {"status": "pass", **CHECKS[name]()}
    except Skip as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        return {"status": "fail", "reason": f"{type(error).__name__}: {error}"[-2000:]}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(_one(sys.argv[2])), flush=True)
        return
    names = sys.argv[1:] or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        sys.exit(f"unknown check {unknown[0]!r}; there are: {', '.join(CHECKS)}")
    found = run(names)
    print(json.dumps(found, indent=2))
    sys.exit(any(check["status"] == "fail" for check in found["checks"].values()))


if __name__ == "__main__":
    main()
