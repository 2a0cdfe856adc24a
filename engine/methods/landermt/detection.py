"""Detection: what LANDeRMT's forward and backward passes count, per language pair and per language. Streaming sums.

    detection = Detection.load("runs/landermt/awareness.safetensors")
    detection.relevance("scalar")            # D [pairs, layers - 1] (Eq. 1)
    detection.awareness                      # Φ [languages, layers, I] (Eq. 3-4)

Sums are float64 [groups, layers, width] (BLOOM-7b1, ten pairs of six languages: 73 MB), whatever the number of
sentences. detect.py fills it, awareness.py makes routes of it: every reading of Eq. 1-2 and 5-6 can be tried on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common import __version__, distributed, sealed
from ...common.errors import UserError
from ...data.languages import languages_of
from ...scoring.statistics import by_group
from .awareness import layer_relevance

SCORES = "awareness.safetensors"
FORMAT = "slicetune.detection"


class Detection:
    """Sums over prompts of every pair and over monolingual sentences of every language:

    hidden_sum     float64 [pairs, layers, I]      of the prompt's mean post-activation h
    output_sum     float64 [pairs, layers, H]      of the prompt's mean FFN output
    awareness_sum  float64 [languages, layers, I]  of the sentence's |∂L/∂h · h|, reduced over its tokens
    prompts int64 [pairs], sentences int64 [languages]

    `languages` are the pairs' in alphabetical order. Raises UserError for names that are no pairs.
    """

    SUMS = ("hidden_sum", "output_sum", "awareness_sum", "prompts", "sentences")

    def __init__(self, pairs: tuple[str, ...], layers: int, intermediate: int, hidden: int) -> None:
        self.pairs, self.languages = tuple(pairs), languages_of(pairs)
        self.size = {"layers": layers, "intermediate": intermediate, "hidden": hidden}
        self.provenance: dict[str, Any] = {}
        wide = {"hidden_sum": intermediate, "output_sum": hidden}
        for name, width in wide.items():
            setattr(self, name, torch.zeros(len(self.pairs), layers, width, dtype=torch.float64))
        self.awareness_sum = torch.zeros(len(self.languages), layers, intermediate, dtype=torch.float64)
        self.prompts = torch.zeros(len(self.pairs), dtype=torch.int64)
        self.sentences = torch.zeros(len(self.languages), dtype=torch.int64)

    @property
    def hidden(self) -> Tensor:
        """Mean h [pairs, layers, I]."""
        return self.hidden_sum / self.prompts[:, None, None]

    @property
    def output(self) -> Tensor:
        """Mean output [pairs, layers, H]."""
        return self.output_sum / self.prompts[:, None, None]

    @property
    def awareness(self) -> Tensor:
        """Φ [languages, layers, I] (Eq. 3-4)."""
        return self.awareness_sum / self.sentences[:, None, None]

    @property
    def bytes(self) -> int:
        """Of the file that `save` writes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def relevance(self, activation: Literal["scalar", "vector"]) -> Tensor:
        """D [pairs, layers - 1] (Eq. 1)."""
        return layer_relevance(self.hidden, self.output, activation)

    def add_prompts(self, pairs: Tensor) -> None:
        """Counts prompts, int64 [samples] of pairs: once a batch."""
        self.prompts += torch.bincount(pairs.cpu(), minlength=len(self.pairs))

    def add_activations(self, layer: int, hidden: Tensor, output: Tensor, pairs: Tensor) -> None:
        """Adds means over each prompt's tokens: hidden [samples, I], output [samples, H]; pairs int64 [samples]."""
        self.hidden_sum[:, layer] += by_group(hidden, pairs, len(self.pairs)).cpu()
        self.output_sum[:, layer] += by_group(output, pairs, len(self.pairs)).cpu()

    def add_sentences(self, languages: Tensor) -> None:
        """Counts sentences, int64 [samples] of languages: once a batch."""
        self.sentences += torch.bincount(languages.cpu(), minlength=len(self.languages))

    def add_awareness(self, layer: int, awareness: Tensor, languages: Tensor) -> None:
        """Adds sentences' awareness [samples, I] of one layer; languages int64 [samples]."""
        self.awareness_sum[:, layer] += by_group(awareness, languages, len(self.languages)).cpu()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.SUMS}

    def all_reduce(self) -> None:
        """Sums over the ranks of torch.distributed, in place; does nothing where it is not initialised."""
        distributed.add_over_ranks(self._tensors().values())

    def save(self, path: str | os.PathLike[str], provenance: dict[str, Any] | None = None) -> None:
        """Writes a sealed safetensors file, renamed into place."""
        self.provenance = dict(provenance if provenance is not None else self.provenance)
        about = {"pairs": self.pairs, **self.size}
        metadata = {"format": FORMAT, "about": json.dumps(about), "provenance": json.dumps(self.provenance)}
        metadata["slicetune"] = __version__
        sealed.write(Path(path), self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote. Raises UserError, naming the file, for anything that is not valid."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a run of LANDeRMT writes it in its score stage")
        sealed.check(Path(path), FORMAT, "delete it and score again, by the run's own command")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                about = json.loads(metadata["about"])
                detection = cls(tuple(about.pop("pairs")), **about)
                detection.provenance = json.loads(metadata["provenance"])
                sealed.add(file, detection._tensors())
            return detection
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: not readable as detection ({error}); score again") from error

    def save_part(self, path: Path) -> None:
        """Writes what this rank has, in the middle of a pass; `take` reads it."""
        self.save(path)

    def take(self, parts: Sequence[Path]) -> None:
        """Go on from what all ranks of a broken pass saved, `parts` in their order; this detection is empty before.

        The sums of rank r of then go to rank r % ranks of now. Raises UserError naming a file that is no part.
        """
        for path in parts[distributed.rank() :: distributed.world()]:
            part = self.load(path)
            for name, tensor in self._tensors().items():
                tensor += getattr(part, name)
