"""DeepSpeed ZeRO under the learner: the process group, the configuration, the model, and the training backend.

Everything that names DeepSpeed lives here; ``hapo_async.learner.learn`` only sees a ``Backend``. Every function is called by
all ranks in the same order: ZeRO-3 gathers parameters inside forward and backward passes, so a rank that computes less
than the others would leave them waiting.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import logging
import math
import os
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hapo_async import lora
from hapo_async.batch import MicroBatch
from hapo_async.config import Config
from hapo_async.errors import ConfigError
from hapo_async.learner.backend import Update, set_optimizer
from hapo_async.learner.policy import adamw, load_policy

log = logging.getLogger(__name__)

# The sections of DeepSpeed 0.19's configuration that a user may set. Left out: what `learner:` decides, and what would
# change the sums that the learner relies on (precision, gradient scaling, elasticity).
_PASSED_ON = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "flops_profiler",
        "memory_breakdown",
        "monitor_config",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
        "zero_optimization",
    }
)
_OWNED = {
    "train_batch_size": "train.batch_prompts",
    "train_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "gradient_accumulation_steps": "learner.micro_batch_tokens",
    "gradient_clipping": "learner.grad_clip",
    "bf16": "learner.dtype",
    "bfloat16": "learner.dtype",
    "fp16": "learner.dtype",
    "optimizer": "learner.lr and learner.adamw",
    "scheduler": "learner.lr_schedule",
    "torch_autocast": "learner.dtype",
}


def check_overrides(section: dict[str, Any]) -> None:
    """Checks the ``deepspeed:`` section before anything starts. Raises ConfigError with value, rule and fix.

    DeepSpeed is only imported (slow) when there is a ``zero_optimization`` part to check against its own arguments.
    """
    for key in section:
        if key in _OWNED:
            raise ConfigError(f"deepspeed.{key} is decided by {_OWNED[key]}; set that instead.")
        _refuse_unknown(key, _PASSED_ON, "deepspeed.")
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization={zero!r} must be a section of key: value pairs.")
    if "stage" in zero:
        raise ConfigError("deepspeed.zero_optimization.stage is decided by learner.zero_stage; set that instead.")
    if zero:
        _check_zero(zero)


def _refuse_unknown(key: str, known: Collection[str], prefix: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        raise ConfigError(f"unknown key {prefix + key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))


def _check_zero(zero: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key in zero:
        _refuse_unknown(key, known, "deepspeed.zero_optimization.")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        raise ConfigError(f"deepspeed.zero_optimization: {error}") from None


def engine_config(config: Config, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Accumulation and normalisation are ours: DeepSpeed sees one micro-batch at a time."""
    section = dict(config.deepspeed)
    zero = {
        "stage": config.learner.zero_stage,
        "overlap_comm": device == "cuda",
        "contiguous_gradients": True,
        # Gathering many small parameters costs latency only: those below this size stay whole on every rank.
        "stage3_param_persistence_threshold": 100_000,
        **section.pop("zero_optimization", {}),
    }
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.learner.grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }
    if dtype == torch.bfloat16:
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**own, **section}


# --------------------------------------------------------------------------------------------------------------------
# The process group


def listen(ip: str) -> tuple[socket.socket, int]:
    """A socket for the rendezvous store, bound to ``ip`` only (torch by itself would bind every interface)."""
    listener = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
    return listener, listener.getsockname()[1]


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: its number, the world's size, and where the ranks meet (rank 0 listens there)."""

    rank: int
    world_size: int
    ip: str
    port: int
    device: str
    timeout_s: float


def join(seat: Seat, listener: socket.socket | None = None) -> None:
    """Joins the process group: gloo on CPU, NCCL on GPU. A collective that takes longer than the timeout raises."""
    os.environ.update(RANK=str(seat.rank), WORLD_SIZE=str(seat.world_size), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=seat.ip, MASTER_PORT=str(seat.port))
    if seat.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if seat.ip.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import deepspeed
    import torch.distributed as dist

    # DeepSpeed would compile a shared-memory operator for CPU ranks (most of a minute); gloo does without. The module
    # is looked up by its full name: as an attribute of deepspeed.comm, `torch` is PyTorch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    timeout = timedelta(seconds=seat.timeout_s)
    store: dist.Store
    if seat.world_size == 1:
        store = dist.HashStore()
    else:
        store = dist.TCPStore(
            seat.ip,
            seat.port,
            seat.world_size,
            is_master=listener is not None,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    backend = "nccl" if seat.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.world_size, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------------
# The backend


class ZeroBackend:
    """Trains a PolicyModel under DeepSpeed; see ``hapo_async.learner.backend.Backend`` for what each method promises."""

    def __init__(
        self, model_path: str, config: Config, *, dtype: torch.dtype, device: str, with_value: bool = False
    ) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        from actors.host_copies import HostCopies

        tree = engine_config(config, dtype, device)
        # While this object lives, from_pretrained loads each weight straight into its ZeRO-3 partition.
        self._hf = HfDeepSpeedConfig(tree) if config.learner.zero_stage == 3 else None
        policy = load_policy(
            model_path, config, dtype=dtype, device=None if self._hf else device, with_value=with_value
        )
        self.lora = lora.Lora.of(config)
        self.targets = lora.attach(policy.model, self.lora, config.seed) if self.lora else ()
        self._dropouts = lora.dropouts(policy.model)
        optimizer = _optimizer([p for p in policy.parameters() if p.requires_grad], config, tree, device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=tree, dist_init_required=False
        )
        self._copies = self.engine.checkpoint_engine = HostCopies()
        self.engine._copy_recovery_script = lambda path: None  # the whole policy lies beside the shards anyway
        self.torch_optimizer = optimizer
        self.policy = policy
        self.device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.stage = config.learner.zero_stage
        self.world_size: int = torch.distributed.get_world_size()
        self.rank: int = torch.distributed.get_rank()
        # DeepSpeed averages over ranks; our losses are already divided by the global count and want a sum.
        self.loss_scale = float(self.world_size)
        self._bound = _NormBound(self.optimizer)
        self.moved: Callable[[], None] = lambda: None  # called whenever something was done

    def forward(self, micro: MicroBatch, **wanted: Any) -> torch.Tensor:
        for dropout in self._dropouts:  # what is scored without gradient is scored by the whole adapter
            dropout.train(torch.is_grad_enabled())
        return self.engine(micro, **wanted)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.loss_scale, scale_wrt_gas=False)
        self.moved()

    def update(self, max_norm: float | None = None) -> Update:
        self._bound.set(max_norm)
        self.engine.step()
        self.moved()
        norm = self._bound.exceeded or float(self.engine.get_global_grad_norm())
        return Update(grad_norm=norm, applied=not self.optimizer.overflow)

    def configure(self, config: Config) -> None:
        set_optimizer(self.torch_optimizer, config)
        self.optimizer.clip_grad = config.learner.grad_clip

    def agree_max(self, values: list[int]) -> list[int]:
        return self._reduce(torch.tensor(values, device=self.device), "MAX").tolist()

    def agree_sum(self, values: list[float]) -> list[float]:
        return self._reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "SUM").tolist()

    def _reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, how))
            self.moved()
        return tensor

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return values
        mine = [len(values) if rank == self.rank else 0 for rank in range(self.world_size)]
        lengths = self.agree_max(mine)
        padded = torch.zeros(max(lengths), dtype=values.dtype, device=self.device)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def sleep(self) -> None:
        """Moves weights, gradients and optimizer state to the host, for others to use the GPU; with LoRA the frozen weights,
        which are nearly all. On a CPU, and where DeepSpeed cannot move them (ZeRO below 3, or states that live on the
        host anyway), everything stays."""
        if self.lora and self.device.type == "cuda":
            self._move_frozen(torch.device("cpu"))
            torch.cuda.empty_cache()
        elif self._can_move:
            self.engine.offload_states()
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Takes back what ``sleep`` moved."""
        if self.lora and self.device.type == "cuda":
            self._move_frozen(self.device)
        elif self._can_move:
            self.engine.reload_states()

    def _move_frozen(self, device: torch.device) -> None:
        """DeepSpeed's own way takes all parameters for trained ones. What ``offload_param`` keeps on the host stays there."""
        if self.engine.config.get("zero_optimization", {}).get("offload_param"):
            return
        if self.stage == 3:
            self.engine.empty_partition_cache()
        for parameter in self.policy.parameters():
            if not parameter.requires_grad:
                held: torch.Tensor = getattr(parameter, "ds_tensor", parameter)  # a rank's own part
                held.data = held.data.to(device)

    @property
    def _can_move(self) -> bool:
        offloaded = any(
            self.engine.config.get("zero_optimization", {}).get(f"offload_{x}") for x in ("param", "optimizer")
        )
        return self.device.type == "cuda" and self.stage == 3 and not offloaded

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Hugging Face names, tied weights once. With LoRA: peft's names, the frozen weights among them."""
        return self.policy.model.named_parameters()

    @contextlib.contextmanager
    def gathered(self, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        """Whole parameters inside the context, on every rank; a collective under ZeRO-3."""
        import deepspeed

        self.moved()
        if self.stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            yield

    def capture(self, folder: Path) -> dict[Path, Any]:
        """Copies of DeepSpeed's own state (of each rank its shard), by the files below ``folder`` that they belong into, frozen
        weights left out; a collective that writes nothing."""
        frozen: dict[str, Any] = {"exclude_frozen_parameters": self.lora is not None}
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False, **frozen)
        return self._copies.take()

    def load(self, folder: Path, universal: bool = False) -> None:
        """Restores what was written of ``capture``, or its conversion to DeepSpeed's universal format; a collective."""
        self.engine._config.load_universal_checkpoint = universal
        path, _ = self.engine.load_checkpoint(
            str(folder), tag="zero", load_lr_scheduler_states=False, load_module_strict=self.lora is None
        )
        self.engine._config.load_universal_checkpoint = False
        if path is None:
            raise FileNotFoundError(f"no DeepSpeed state in {folder}")


class _NormBound:
    """Makes a ZeRO optimizer take a gradient norm above a bound for one that is not finite: it then clears the gradients
    and steps nothing, on any rank. Every stage computes the norm in one method, which is none of DeepSpeed's public
    ones; an optimizer without it refuses the bound."""

    _METHODS = ("_get_norm_groups", "scaled_global_norm")  # stage 3: a list of parts; stages 1 and 2: the norm

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._wrapped = False
        self._limit: float | None = None
        self.exceeded: float | None = None

    def set(self, limit: float | None) -> None:
        """The bound of the next step; None: there is none. Raises ConfigError where this optimizer has no such method."""
        self._limit, self.exceeded = limit, None
        if limit is None or self._wrapped:
            return
        name = next((n for n in self._METHODS if hasattr(self._optimizer, n)), None)
        if name is None:
            raise ConfigError(
                f"options.skip_grad_norm={limit} is not supported by DeepSpeed's {type(self._optimizer).__name__}; set "
                "learner.zero_stage to 2 or 3, or leave the option out."
            )
        setattr(self._optimizer, name, functools.partial(self._bounded, getattr(self._optimizer, name)))
        self._wrapped = True

    def _bounded(self, measured: Callable[[], Any]) -> Any:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms = measured()
        norm = float(combine_grad_norm_groups(norms) if isinstance(norms, list) else norms)
        if self._limit is None or not math.isfinite(norm) or norm <= self._limit:
            return norms
        self.exceeded = norm
        return [n * math.inf for n in norms] if isinstance(norms, list) else norms * math.inf


def _optimizer(
    trained: list[torch.nn.Parameter], config: Config, tree: dict[str, Any], device: str
) -> torch.optim.Optimizer:
    offload = tree["zero_optimization"].get("offload_optimizer") or {}
    if device == "cuda" and isinstance(offload, dict) and offload.get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # vectorised; compiled on first use

        c = config.learner
        return DeepSpeedCPUAdam(trained, lr=c.lr, **c.adamw)
    return adamw(trained, config, fused=device == "cuda")
