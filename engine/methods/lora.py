"""LoRA: W + (alpha/rank)·B·A beside linear layers of the blocks, by PEFT; merged into the weights on export.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models".

The adapters have the model's dtype (PEFT's `autocast_adapter_dtype` is off): ZeRO keeps their fp32 masters, as it does
for every method's parameters, and those are what is merged. The paper's counts on Llama-3.1 are those of r=16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common import private
from ..common.checkpoint import masters
from ..common.errors import UserError
from ..models.quantised import layers as quantised
from ..models.shapes import ModelShape, from_config
from ..models.sites import find_ffns
from ..slices.patches import Patch
from .counts import Trainable, frozen_values, input_values, linears, low_rank, named
from .method import Method


@dataclass
class Lora(Method):
    """Settings of the adapters, by PEFT's names."""

    rank: int = 8
    alpha: float = 16.0
    """B·A counts alpha/rank times."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get an adapter, as in `query_key_value`. Where none is named, or the model has none of
    these, all do that the method has."""

    kind: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    low_rank: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    attention: ClassVar[bool] = True
    """Adapters beside the attention's layers too."""
    magnitude: ClassVar[bool] = False
    """DoRA's."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"--method.rank {self.rank}: must be at least 1")

    def bounds(self, shape: ModelShape) -> Trainable:
        parameters = low_rank(shape, self.rank, self.layers(shape), self.magnitude)
        return Trainable.known(parameters, added=parameters)

    def saved_values(self, shape: ModelShape) -> int:
        """What the adapted layers read too; DoRA's twice what they give."""
        outputs = {name: width for name, (_, width) in linears(shape).items()}
        trained = self.layers(shape)
        values = frozen_values(shape) + input_values(shape, trained)
        return values + self.magnitude * 2 * sum(outputs[name] for name in trained)

    def layers(self, shape: ModelShape) -> list[str]:
        """Names of the layers of a block that get an adapter: those named, all where the model has none of these.

        Raises UserError where it has some of them alone.
        """
        known = list(linears(shape, self.attention))
        return there(self.target_modules, known, shape.name) or known

    def notes(self, shape: ModelShape) -> list[str]:
        taken = self.layers(shape)
        if not self.target_modules or set(taken) <= set(self.target_modules):
            return []
        where = "blocks" if self.attention else "FFNs"
        return [elsewhere(self.target_modules, shape.name, taken, f"all linear layers of the {where} are taken")]

    def prepare(self, model: nn.Module, chosen: None = None, *, seed: int = 0, **_: Any) -> None:
        """A is drawn from the run's seed on every rank, B is zero: the model starts as the base."""
        from peft import inject_adapter_in_model

        if self.reads_weights and any(quantised.kind(layer) == "fp8" for _, layer in quantised.layers(model)):
            raise UserError(f"{self.title} reads the weights themselves, which are fp8: use nf4 or int8")
        model.requires_grad_(False)
        torch.manual_seed(seed)
        config = self.peft_config(self.targets(model))
        with private.zero3_known(model):
            inject_adapter_in_model(config, model)
        for adapter in (p for p in model.parameters() if p.requires_grad):
            adapter.data = adapter.data.to(model.dtype)  # beside a quantised layer PEFT makes them fp32

    def targets(self, model: nn.Module) -> list[str]:
        """Full names of the layers that get an adapter, in the model's order."""
        wanted, targets = self.layers(from_config(model.config)), []
        for block in (site.block for site in find_ffns(model)):
            inside = [name for name, m in model.get_submodule(block).named_modules() if isinstance(m, nn.Linear)]
            targets += [f"{block}.{name}" for name in inside if any(named(name, each) for each in wanted)]
        return targets

    def may_change(self, model: nn.Module) -> set[str]:
        return {f"{name}.weight" for name in self.targets(model)}

    def peft_config(self, targets: list[str]):
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets, use_dora=self.magnitude)

    def patches(self, base: Path, neurons: None, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        """W + s·B·A in fp32 of every layer, DoRA's rescaled to the trained magnitude; a layer at a time, on export."""
        mark, trained = ".lora_A.default.weight", masters(tensors)
        names = [name.removesuffix(mark) for name in trained if name.endswith(mark)]
        return {f"{name}.weight": Patch(None, None, self._merge(name, trained)) for name in names}

    def _merge(self, name: str, trained: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        a, b = (trained[f"{name}.lora_{part}.default.weight"] for part in "AB")
        magnitude = trained.get(f"{name}.lora_magnitude_vector.default.weight")

        def merged(weight: Tensor) -> Tensor:
            total = weight.float() + (b @ a) * (self.alpha / self.rank)
            return total if magnitude is None else total * (magnitude / total.norm(dim=1))[:, None]

        return merged


def there(wanted: Sequence[str], known: Sequence[str], model: str) -> list[str]:
    """Those of the layers `known` that are named in `wanted`, in the model's order; none where it has not one of them.

    Raises UserError where it has some of them alone: the others are misspelt, or of another model.
    """
    found = [name for name in known if name in wanted]
    if found and (missing := [name for name in wanted if name not in known]):
        raise UserError(
            f"--method.target-modules: {model} has {', '.join(found)}, but not {', '.join(missing)}: name some of "
            f"{', '.join(known)}"
        )
    return found


def elsewhere(wanted: Sequence[str], model: str, taken: Sequence[str], what: str) -> str:
    """The line of a model without any of the `wanted` layers."""
    return f"--method.target-modules {' '.join(wanted)}: {model} has none of these; {what}: {', '.join(taken)}"


@dataclass
class Dora(Lora):
    """Settings of the adapters, by PEFT's names. One magnitude an output channel is trained besides."""

    kind: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"
    compiles: ClassVar[bool] = False
    magnitude: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True


@dataclass
class LoraMlp(Lora):
    """Settings of the adapters, by PEFT's names."""

    kind: ClassVar[str] = "lora_mlp"
    title: ClassVar[str] = "LoRA-MLP"
    attention: ClassVar[bool] = False
