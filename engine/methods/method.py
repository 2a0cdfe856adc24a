"""What a method tells the run: what it scores, which neurons it selects, what it trains, what that changes.

A method is a dataclass of settings; `kind` is its name in files and recipes. The defaults here are those
of the methods that select neurons and train their slices; the others say where they differ. All go through the same
run.py: same data, batches, evaluation and artefacts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..slices.patches import slice_patches

if TYPE_CHECKING:
    from ..models.shapes import ModelShape
    from ..run.config import RunConfig
    from ..scoring.statistics import Statistics
    from ..slices.neurons import NeuronSet
    from ..slices.patches import Patch
    from .counts import Trainable
    from .expansion import Expansion


class Method:
    """One row of the paper's table; at most two levels of subclasses."""

    kind: ClassVar[str]
    """Its name in config.json, results.json, file names and recipes."""
    title: ClassVar[str]
    """How it is written in a table."""
    scores: ClassVar[bool] = False
    """Whether `select` reads the statistics of a scoring pass."""
    selects: ClassVar[bool] = True
    """Whether it trains the slices of a NeuronSet."""
    routes: ClassVar[bool] = False
    """Whether it detects the layers and units of language pairs."""
    routed: ClassVar[bool] = False
    """Whether it trains and decodes the model routed by pair."""
    trains: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    """Whether what it trains becomes part of the base's weights, so that the export is a plain model (out/model)."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Files that its settings name: what is in them is a setting too."""
        return ()

    def bounds(self, shape: ModelShape) -> Trainable:
        """Trainable and added parameters, by arithmetic alone."""
        raise NotImplementedError

    def select(self, stats: Statistics | None, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        """The neurons and what the user should be told; `stats` is None where the method scores nothing."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, neurons: NeuronSet | None, config: RunConfig) -> None:
        """Make in place what is trained require a gradient, and nothing else. The same bits on every rank."""
        from ..slices.ffn import attach

        attach(model, neurons, config.model.recompute_ffn)

    def patches(self, base: Path, neurons: NeuronSet | None, tensors: dict[str, Tensor]) -> dict[str, Patch]:
        """What a checkpoint's tensors (`master/<name>`: trained values, fp32) change in the model: name → values."""
        return slice_patches(base, neurons, tensors)

    def may_change(self, model: nn.Module) -> set[str] | None:
        """Names of the tensors of the base that may differ as a whole when the run is done; None: any of them.

        What a NeuronSet names is not among them. `model` is the base without memory. audit.py holds a run to it.
        """
        return set()

    def expansion(self, layers: int) -> Expansion | None:
        """Blocks that the exported model has besides the base's."""
        return None
