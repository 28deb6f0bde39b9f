"""LoRA policies (Hu et al., 2021): which layers get an adapter, how it is named, attached, merged and saved.

    learner       peft's layers around the targets, the base frozen      W x + alpha/rank B A x
    stream        lora_A and lora_B of every target, nothing else        named as peft saves them
    generators    W of the files that they started from + alpha/rank B A, so that sampling runs at full speed
    checkpoint    model/ is merged, model/adapter/ is for peft

Legend: r rank; a target is a linear layer with weight W [O, I]; its adapter is A [r, I] and B [O, r], B = 0 at the start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hapo_async import algorithms
from hapo_async.config import Config
from hapo_async.errors import ConfigError, RunError

ADAPTER = "adapter"
"""The folder inside ``model/`` that holds the adapter in peft's format."""

_PREFIX = "base_model.model."
_INSIDE, _SAVED = ((f".lora_A.{slot}weight", f".lora_B.{slot}weight") for slot in ("default.", ""))

Pair = tuple[Tensor, Tensor]
"""(A [r, I], B [O, r]) of one target."""


@dataclass(frozen=True)
class Lora:
    """``learner.lora``. targets: names of linear layers, or their ends; none: all of the decoder."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float

    @classmethod
    def of(cls, config: Config) -> Lora | None:
        """None where LoRA is off."""
        table = config.learner.lora
        if not table:
            return None
        targets = () if table["targets"] == "auto" else tuple(table["targets"])
        return cls(table["rank"], table["alpha"], targets, table["dropout"])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def peft_config(self, targets: Iterable[str], base: str = "") -> Any:
        """peft's own configuration. base: the model that the adapter belongs to."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),  # peft divides it by r, nothing else
            lora_dropout=self.dropout,
            target_modules=list(targets),
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base or None,
        )


# --------------------------------------------------------------------------------------------------------------------
# Before anything starts


def check(config: Config, model_path: str) -> None:
    """LoRA fits the model and the algorithm. Raises ConfigError with the value, the rule and the fix."""
    lora = Lora.of(config)
    if lora is None:
        return
    ratio = algorithms.get(config.algorithm).rollout.ratio
    if lora.dropout and ratio != "none":
        raise ConfigError(
            f"learner.lora.dropout={lora.dropout} with algorithm={config.algorithm!r}: its ratio compares log-probs of the same "
            "weights, which dropout would turn into noise. Set learner.lora.dropout=0."
        )
    resolve(lora, skeleton(model_path))
    if Path(model_path).is_dir():
        try:
            # The transformers engine holds what has no adapter, whatever the files call it.
            Merger(model_path, lora, torch.float32)
        except RunError as error:
            raise ConfigError(str(error)) from None


def skeleton(model_path: str) -> Any:
    """The model without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    model.tie_weights()
    return model


def resolve(lora: Lora, model: Any) -> tuple[str, ...]:
    """The targets as peft takes them: ends of module names. Raises ConfigError for a name that fits no linear layer."""
    found = _linear(model)
    ends = sorted({name.rsplit(".", 1)[-1] for name in found})
    if not found:
        raise ConfigError(
            "learner.lora: this model's decoder has no linear layers (torch.nn.Linear) to adapt. Set it to {}."
        )
    for target in lora.targets:
        if not any(_fits(name, target) for name in found):
            raise ConfigError(
                f"learner.lora.targets names {target!r}, which is no linear layer of this model's decoder (its output head "
                f"cannot be adapted). Those are {', '.join(ends)}; or set targets: auto for all."
            )
    return lora.targets or tuple(ends)


def layers(targets: Iterable[str], model: Any) -> dict[str, tuple[int, int]]:
    """(O, I) of each adapted layer, by its name in a model without adapters."""
    wanted = list(targets)
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in _linear(model).items()
        if any(_fits(name, target) for target in wanted)
    }


def size(config: Config, model_path: str) -> int:
    """Parameters of the adapter; 0 where LoRA is off."""
    lora = Lora.of(config)
    if lora is None:
        return 0
    model = skeleton(model_path)
    return lora.rank * sum(o + i for o, i in layers(resolve(lora, model), model).values())


def _linear(model: Any) -> dict[str, nn.Linear]:
    head, inside = model.get_output_embeddings(), {id(m) for m in model.get_decoder().modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside and m is not head}


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


# --------------------------------------------------------------------------------------------------------------------
# The learner's side


def attach(model: Any, lora: Lora, seed: int) -> tuple[str, ...]:
    """Freezes a Hugging Face model and puts adapters around its targets, in place; returns the targets. Where each A starts
    follows from the seed. Raises ConfigError."""
    from peft import inject_adapter_in_model

    targets = resolve(lora, model)
    expected = layers(targets, model)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora.peft_config(targets), model)
    adapted = {name.removesuffix(_INSIDE[0]) for name, _ in model.named_parameters() if name.endswith(_INSIDE[0])}
    if adapted != set(expected):
        odd = sorted(adapted ^ set(expected))
        raise ConfigError(
            f"learner.lora.targets={list(targets)}: peft would adapt other layers than these, such as {odd[0]!r}."
        )
    return targets


def dropouts(model: nn.Module) -> list[nn.Module]:
    """The dropout in front of each adapter, where there is any."""
    return [m for n, m in model.named_modules() if ".lora_dropout." in n and isinstance(m, nn.Dropout) and m.p > 0]


def streamed(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters among a model's parameters, under the names that peft saves them by."""
    for name, parameter in named:
        saved = _saved_name(name)
        if saved:
            yield saved, parameter


def taken_apart(state: Mapping[str, Tensor], scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(merged, adapter): the model's weights under Hugging Face names, each merged in fp32 and in its own type again, and
    the adapter's as peft saves them. state: parameters of a model with adapters, by name."""
    adapter = {saved: tensor for name, tensor in state.items() if (saved := _saved_name(name))}
    merged = {n.replace(".base_layer.", "."): t for n, t in state.items() if not _saved_name(n)}
    for layer, (a, b) in pairs(adapter.items()).items():
        weight = merged[f"{layer}.weight"]
        merged[f"{layer}.weight"] = merge(weight, a, b, scale).to(weight.dtype)
    return merged, adapter


def write(folder: Path, adapter: Mapping[str, Tensor], lora: Lora, targets: Iterable[str], base: str) -> None:
    """The adapter as ``peft.PeftModel.from_pretrained`` reads it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = lora.peft_config(targets, base)
    settings.inference_mode = True
    settings.save_pretrained(folder)
    save_file(dict(adapter), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _saved_name(name: str) -> str | None:
    for inside, saved in zip(_INSIDE, _SAVED, strict=True):
        if name.endswith(inside):
            return _PREFIX + name.removesuffix(inside) + saved
    return None


# --------------------------------------------------------------------------------------------------------------------
# Merging


def pairs(adapter: Iterable[tuple[str, Tensor]]) -> dict[str, Pair]:
    """A and B of each layer, by the layer's name. Raises ValueError for other names and for half a pair."""
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, tensor in adapter:
        side = next((i for i, end in enumerate(_SAVED) if name.endswith(end)), None)
        if side is None or not name.startswith(_PREFIX):
            raise ValueError(f"{name!r} is not a tensor of an adapter")
        halves[side][name.removeprefix(_PREFIX).removesuffix(_SAVED[side])] = tensor
    if halves[0].keys() != halves[1].keys():
        raise ValueError(f"half an adapter arrived for {sorted(halves[0].keys() ^ halves[1].keys())[0]!r}")
    return {layer: (a, halves[1][layer]) for layer, a in halves[0].items()}


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """[O, I]: W + scale B A in fp32 (fp64 for fp64 adapters), with W as the learner holds it: in the adapter's type."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    held = weight.to(device=a.device, dtype=a.dtype).to(wide)
    return torch.addmm(held, b.to(wide), a.to(wide), alpha=scale)


class Merger:
    """Makes a full version of an adapter, on a generator: W of the safetensors files that it started from, read when asked
    for and never kept, plus alpha/rank B A. Every adapter counts from there: none builds on another.

    dtype: of the generator's weights. Raises RunError for a model without such files, or whose files call a weight otherwise.
    """

    def __init__(self, model_path: str, lora: Lora, dtype: torch.dtype) -> None:
        model = skeleton(model_path)
        self.layers = layers(resolve(lora, model), model)
        self._scale, self._dtype = lora.scale, dtype
        adapted = {f"{layer}.weight" for layer in self.layers}
        self._others = [name for name, _ in model.named_parameters() if name not in adapted]
        self._files = _index(model_path)
        missing = [name for name in (*sorted(adapted), *self._others) if name not in self._files]
        if missing:
            raise RunError(
                f"learner.lora: the files of model {model_path!r} hold no tensor {missing[0]!r}; this architecture is stored "
                "otherwise than it is computed, and adapters cannot be merged into it. Set learner.lora to {}."
            )

    def full(self, adapter: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """All weights, those with an adapter on the adapter's device. Raises ValueError for an adapter that is not exactly of
        these layers."""
        found = pairs(adapter)
        for layer in sorted(found.keys() ^ self.layers.keys()):
            raise ValueError(
                f"layer {layer!r}: its adapter {'is missing' if layer in self.layers else 'is not expected'}"
            )
        for layer, (a, b) in found.items():
            if (len(b), a.shape[-1]) != self.layers[layer] or len(a) != b.shape[-1]:
                raise ValueError(
                    f"layer {layer!r} is {self.layers[layer]}; A {tuple(a.shape)} and B {tuple(b.shape)} arrived"
                )
        out = [
            (name, merge(weight, *found[name.removesuffix(".weight")], self._scale).to(self._dtype))
            for name, weight in self._read([f"{layer}.weight" for layer in found])
        ]
        return [*out, *((name, weight.to(self._dtype)) for name, weight in self._read(self._others))]

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for path, inside in by_file.items():
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in inside:
                    yield name, file.get_tensor(name)


def _index(model_path: str) -> dict[str, Path]:
    """Which file of a model folder, or of a hub model that has been loaded before, holds which tensor."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(model_path)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(model_path, allow_patterns=patterns, local_files_only=True))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in placed.items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    if not found:
        raise RunError(
            f"learner.lora needs the model {model_path!r} as safetensors files. Save it with save_pretrained first."
        )
    return found
