"""What a method tells the run: what it scores, which neurons it selects, what it trains, what that changes.

A method is a dataclass of settings; `kind` is its name in files and recipes. The defaults here are those
of the methods that select neurons and train their slices; the others say where they differ. All go through the same
run (run/run.py): same data, batches, evaluation and artefacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.records import Pair
from ..models.shapes import ModelShape
from ..scoring.statistics import Statistics
from ..slices.ffn import attach
from ..slices.neurons import NeuronSet
from ..slices.patches import Patch, slice_patches
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
    low_rank: ClassVar[bool] = False
    """Whether what it trains is LoRA, which PEFT loads as it is."""
    compiles: ClassVar[bool] = True
    """Whether torch.compile can trace what it adds to the model."""
    sums_head: ClassVar[bool] = False
    """Whether it trains the output head, whose gradient is summed in fp32 over chunks of the logits."""
    reads_weights: ClassVar[bool] = False
    """Whether it reads the frozen weights themselves, not their products alone; fp8's are no numbers of PEFT's."""
    follows: ClassVar[bool] = False
    """Whether a comparison runs it after the others, to give it as many parameters as CANEFT's set has."""
    reads_all_tokens: ClassVar[bool] = False
    """Whether its scoring pass must count all tokens of a sentence (--score.tokens)."""

    @property
    def is_base(self) -> bool:
        """Whether what it makes of the base is the base."""
        return False

    @property
    def leads(self) -> bool:
        """Whether its set is the one that others take their number of parameters from: CANEFT, no ablation."""
        return False

    @property
    def trains_slices(self) -> bool:
        """Whether it trains rows and columns beside frozen weights."""
        return self.selects or self.routed

    @property
    def trains_whole_weights(self) -> bool:
        """Whether it trains weights of the base, or copies of them, as a whole: they cannot be quantised then."""
        return False

    @property
    def leaves_delta(self) -> bool:
        """Whether all that it trains is rows and columns, which can be put in and taken off again (out/delta)."""
        return self.selects

    @property
    def adapts(self) -> bool:
        """Whether what it trains can be written as a LoRA adapter (--export.adapter)."""
        return self.selects or self.low_rank

    @property
    def statistics_file(self) -> str:
        """What its scoring pass leaves in the run's folder."""
        return "statistics.safetensors"

    @property
    def chosen_file(self) -> str:
        """What `select` leaves in the run's folder; empty where nothing is chosen."""
        return "neurons.safetensors" if self.selects else ""

    @property
    def trained_folder(self) -> str:
        """Where a run keeps what was trained: a plain model, or what is attached to the base."""
        return "model" if self.merges else "attached"

    @property
    def reads(self) -> tuple[str, ...]:
        """Files that its settings name: what is in them is a setting too."""
        return ()

    @property
    def least_groups(self) -> int:
        """How many groups (domains or directions) its choice compares: known before anything is scored."""
        return 1

    def bounds(self, shape: ModelShape) -> Trainable:
        """Trainable and added parameters, by arithmetic alone."""
        raise NotImplementedError

    def check(self, shape: ModelShape, groups: int, like: Trainable | None = None) -> None:
        """Raises UserError for settings that this model, or so many groups, cannot have: before anything is scored.

        `like` is what a comparison will give a method that follows, to have as many parameters.
        """
        self.bounds(shape)  # counts what it trains, and so meets layers and sizes that the model has not

    def notes(self, shape: ModelShape) -> list[str]:
        """What its settings turn into on this model, where that is not what they say; a line each."""
        return []

    def trains_biases(self, shape: ModelShape) -> bool:
        """Whether entries of a bias are trained with the rows that a method chooses: no LoRA adapter can hold them."""
        return self.selects and shape.mlp_bias

    def select(self, stats: Statistics | None, shape: ModelShape, seed: int) -> tuple[NeuronSet, list[str]]:
        """The neurons and what the user should be told; `stats` is None where the method scores nothing."""
        raise NotImplementedError

    def load_chosen(self, run: Path) -> NeuronSet | None:
        """What `select` has left in a run's folder; None where nothing is chosen."""
        return NeuronSet.load(run / self.chosen_file) if self.selects else None

    def how_many(self) -> str:
        """Where the number of chosen neurons comes from, for the dry run."""
        raise NotImplementedError

    def beside(self, counts: Trainable) -> int:
        """Trained weights that lie beside the base's: slices, adapters, new blocks."""
        return counts.likely if self.trains_slices else counts.added

    def saved_values(self, shape: ModelShape) -> int | None:
        """Values a token that a block's FFN and linear layers save for the backward; None where the FFN is fused."""
        return None

    def with_as_many(self, neurons: str) -> Method:
        """The same with as many parameters as the set in the file `neurons` has, where its settings leave that open."""
        return self

    def examples(self, data: DataConfig, domain: str, tests: Sequence[Pair], seed: int) -> list[list[Pair]] | None:
        """Translated examples for the prompt of each test sentence; None where there are none."""
        return None

    def prepare(
        self,
        model: nn.Module,
        chosen: NeuronSet | None,
        *,
        seed: int = 0,
        groups: Sequence[str] = (),
        recompute: bool = False,
    ) -> None:
        """Make in place what is trained require a gradient, and nothing else. The same bits on every rank.

        `chosen` is what `select` chose. New weights are drawn with `seed`. `groups` names the language pair of each
        `Example.group`, `recompute` is --model.recompute-ffn.
        """
        attach(model, chosen, recompute)

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
