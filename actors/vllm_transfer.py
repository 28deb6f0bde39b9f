"""What runs inside vLLM's worker processes: a weight transfer engine that reads a safetensors file on this node, or takes
what this process receives itself (``vllm_device``).

vLLM imports this module in every worker because ``WorkerExtension`` is named as ``worker_extension_cls``; importing it
registers the transfer engine. The generator writes the file into shared memory and removes it after the update.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

from actors.vllm_device import Arrivals
from hapo_async.types import Version

BACKEND = "hapo_file"
EXTENSION = "actors.vllm_transfer.WorkerExtension"


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """One of these. path: a safetensors file with tensors under Hugging Face names. staged: a version that
    ``Arrivals.begin`` has fetched. offer: a version to fetch now, straight into the model."""

    path: str = ""
    staged: str = ""
    offer: dict[str, Any] | None = None


class FileTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads a full checkpoint from a file, layer by layer: on CPUs vLLM prepacks weights, so they are reloaded and
    processed as at the start rather than written in place."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    @functools.cached_property
    def arrivals(self) -> Arrivals:
        return Arrivals(self.parallel_config.rank, self.device)

    def init_transfer_engine(self, init_info: FileInit) -> None:
        pass

    def start_weight_update(self) -> None:
        _forget_unfinished(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator that a CPU does not have
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdate) -> None:
        model: Any = self.model
        if update_info.staged:
            model.load_weights(self.arrivals.take(Version.parse(update_info.staged)))
        elif update_info.offer is not None:
            self.arrivals.pour(update_info.offer, model.load_weights)
        else:
            model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # An output head tied to the embedding receives no tensor of its own, so the reload passes it by; on CPUs it
            # would go on with the copy of the old weights that was packed for the matrix kernel.
            for module in self.model.modules():
                if isinstance(module, VocabParallelEmbedding):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        self.arrivals.close()


def _forget_unfinished(model: Any) -> None:
    """Puts layers back that an update which failed had begun: what had arrived for them must not count for the next."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
            info.reset()


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


class WorkerExtension:
    """What this package asks of a worker besides. Naming it makes vLLM import this module there."""

    def begin_receive(self: Any, request: dict[str, Any]) -> None:
        self.weight_transfer_engine.arrivals.begin(request)

    def receive_state(self: Any) -> dict[str, Any]:
        state: dict[str, Any] = self.weight_transfer_engine.arrivals.state()
        return state

    def cancel_receive(self: Any) -> None:
        self.weight_transfer_engine.arrivals.cancel()

    def abandon_weight_update(self: Any) -> None:
        """Forgets an update that failed before its end, on this rank or on another, so that the next can start."""
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()

    def allocate_stage_inputs(self: Any) -> None:
        """What a later pipeline stage receives its inputs in. vLLM allocates it in a warm-up that CPUs do without."""
        runner = self.model_runner
        if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
            return
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


WeightTransferEngineFactory.register_engine(BACKEND, FileTransferEngine)
if not torch.cuda.is_available() and torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()  # bfloat16 kernels on AMX machines otherwise end the process with SIGILL
