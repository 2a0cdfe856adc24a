"""Routes: which units of which layers take part for which language pair, and with what factor. LANDeRMT's artefact.

    routes = Routes.load("runs/landermt/routes.safetensors")
    print(routes.describe())
    gain = routes.gains(0)                   # float32 [pairs, I] of the first routed layer; 0 takes no part
    row = routes.row("de-en")                # of that pair in every gain table

A layer's units are general, specific to one language, or nobody's. For a pair general units and those of its two
languages take part: general ones scaled by the pair's share (Eq. 6-8), specific ones by what remains to 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common import __version__, sealed
from ...common.errors import UserError
from ...data.languages import languages_of

FORMAT = "slicetune.routes"
ROUTES = "routes.safetensors"
"""Its name in a run's folder, and in that of a routed model."""
GENERAL, NOBODY = -1, -2
CARS = ("general_share", "literal", "learned", "none")


@dataclass(frozen=True, eq=False)
class Routes:
    """Routed layers of one model, for every pair. Tensors are on the CPU. Raises UserError for what does not fit."""

    pairs: tuple[str, ...]
    """Rows of a gain table: "de-en", …"""
    languages: tuple[str, ...]
    layers: tuple[int, ...]
    """Layers that any pair routes, ascending."""
    takes: Tensor
    """bool [pairs, layers]: whether the pair routes and trains the layer (all True for shared layers)."""
    owner: Tensor
    """int16 [layers, I]: index into `languages`, or GENERAL, or NOBODY."""
    share: Tensor
    """float32 [pairs, layers]: factor of general units, 0 to 1; specific units get 1 - share."""
    car: str
    """How `share` was made: general_share, literal, learned (its start); or none: 1 for all that take part."""
    site: str
    """Whether the factor is on the FFN's `input` or on its units' `output`."""
    total_layers: int
    intermediate: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_tensors(self)

    def row(self, pair: str) -> int:
        """The pair's row in a gain table. Raises UserError for a pair that was not detected."""
        if pair not in self.pairs:
            raise UserError(f"pair {pair!r} has no route: there are {' '.join(self.pairs)}")
        return self.pairs.index(pair)

    def own(self) -> Tensor:
        """bool [pairs, languages]: whether the language is one of the pair's two."""
        return torch.tensor([[name in pair.split("-") for name in self.languages] for pair in self.pairs])

    def part(self, position: int) -> Tensor:
        """bool [pairs, I]: whether the unit of layer `layers[position]` takes part; all for pairs not routed there."""
        owner = self.owner[position].long()
        own = self.own()[:, owner.clamp_min(0)] & (owner >= 0)
        return own | (owner == GENERAL) | ~self.takes[:, position, None]

    def gains(self, position: int, share: Tensor | None = None) -> Tensor:
        """float32 [pairs, I]: the factor of every unit of layer `layers[position]` (Eq. 7-8); 0 takes no part.

        Rows of pairs that are not routed there are 1. `share` [pairs] stands in for the stored one where it is
        learned, and gets a gradient.
        """
        share = self.share[:, position] if share is None else share
        owner = self.owner[position].to(share.device)
        part, takes = self.part(position).to(share.device), self.takes[:, position, None].to(share.device)
        factor = torch.where(owner == GENERAL, share[:, None], 1 - share[:, None])
        routed = takes & (self.car != "none")
        return torch.where(part, torch.where(routed, factor, 1.0), 0.0)

    def participants(self, position: int, owner: int) -> frozenset[str]:
        """Pairs in which units of that owner take part and train: the pairs routed there that have the language."""
        takes = self.takes[:, position]
        if owner >= 0:
            takes = takes & self.own()[:, owner]
        chosen = [pair for pair, taken in zip(self.pairs, takes.tolist(), strict=True) if taken]
        return frozenset(chosen if owner != NOBODY else ())

    def counts(self, position: int) -> dict[str, int]:
        """Units of layer `layers[position]` by owner: "general", every language, "nobody"."""
        count = torch.bincount(self.owner[position].long() - NOBODY, minlength=len(self.languages) + 2).tolist()
        return {"general": count[1], **dict(zip(self.languages, count[2:], strict=True)), "nobody": count[0]}

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all but provenance."""
        digest = hashlib.sha256(json.dumps(self._about()).encode())
        for tensor in (self.takes, self.owner, self.share):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """A table: units of every routed layer by owner, and every pair's factor of the general ones."""
        same = "shared by all pairs" if bool(self.takes.all()) else "not all of every pair"
        lines = [
            f"{len(self.layers)} of {self.total_layers} layers routed for {len(self.pairs)} pairs, {same}; "
            f"car {self.car} at the {self.site}"
        ]
        names = ["general", *self.languages, "nobody"]
        lines.append(f"{'layer':8}" + "".join(f"{name:>9}" for name in names))
        for position, layer in enumerate(self.layers):
            lines.append(f"{layer:<8}" + "".join(f"{count:>9,}" for count in self.counts(position).values()))
        lines.append(f"{'share':8}" + "".join(f"{f'layer {layer}':>9}" for layer in self.layers))
        for row, pair in enumerate(self.pairs):
            cells = zip(self.share[row].tolist(), self.takes[row].tolist(), strict=True)
            lines.append(f"{pair:8}" + "".join(f"{share if taken else '–':>9.4}" for share, taken in cells))
        return "\n".join(lines)

    def _about(self) -> dict[str, Any]:
        names = ("pairs", "languages", "layers", "car", "site", "total_layers", "intermediate")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a sealed safetensors file, renamed into place."""
        metadata = {"format": FORMAT, "about": json.dumps(self._about()), "provenance": json.dumps(self.provenance)}
        metadata["slicetune"] = __version__
        tensors = {name: getattr(self, name) for name in ("takes", "owner", "share")}
        sealed.write(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routes:
        """Reads what `save` wrote. Raises UserError, naming the file, for anything that is not valid."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; a run of LANDeRMT writes it in its select stage")
        remedy = "delete it (in a model or a delta, that whole folder) and give the run's command again"
        sealed.check(Path(path), FORMAT, remedy)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                about, provenance = json.loads(metadata["about"]), json.loads(metadata["provenance"])
                tensors = {name: file.get_tensor(name) for name in ("takes", "owner", "share")}
            about |= {name: tuple(about[name]) for name in ("pairs", "languages", "layers")}
            return cls(**about, **tensors, provenance=provenance)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not routes ({error}); select again") from error


def _check_names(routes: Routes) -> None:
    if not routes.pairs or len(set(routes.pairs)) != len(routes.pairs):
        raise UserError(f"pairs {' '.join(routes.pairs) or 'none'}: name at least one, and each once")
    if missing := set(languages_of(routes.pairs)) - set(routes.languages):
        raise UserError(f"languages {' '.join(routes.languages)}: without {' '.join(sorted(missing))} of a pair")
    if routes.car not in CARS or routes.site not in ("input", "output"):
        raise UserError(f"car {routes.car!r} at {routes.site!r}: write one of {' '.join(CARS)}, at input or output")
    layers = routes.layers
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < routes.total_layers:
        raise UserError(f"layers {layers} of {routes.total_layers}: name some of them, ascending")


def _check_tensors(routes: Routes) -> None:
    table, units = (len(routes.pairs), len(routes.layers)), (len(routes.layers), routes.intermediate)
    wanted = {"takes": (torch.bool, table), "owner": (torch.int16, units), "share": (torch.float32, table)}
    for name, (dtype, shape) in wanted.items():
        tensor = getattr(routes, name)
        if tensor.dtype != dtype or tensor.shape != shape:
            raise UserError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    low, high = routes.owner.min().item(), routes.owner.max().item()
    if low < NOBODY or high >= len(routes.languages):
        raise UserError(f"owner {low if low < NOBODY else high}: there are languages 0 to {len(routes.languages) - 1}")
    if not bool(((routes.share >= 0) & (routes.share <= 1)).all()):
        raise UserError("share: not all of it is between 0 and 1")
    if not bool(routes.takes.any(0).all()):
        raise UserError("takes: a layer is routed by no pair")
