"""What LANDeRMT makes of a detection pass: relevant layers, general and specific units, each pair's share. Float64.

    takes = relevant(layer_relevance(hidden, output, "scalar"), k=4, own=False)
    owner = owners(phi, general=90, nobody=0)                # of one layer, phi [languages, units]
    share = general_share(phi, owner, own)                   # of every pair

`Landermt.routes_of` puts them together for all layers. Pure functions of what `detection.py` has counted; every reading
that the paper leaves open is a field of `Landermt` (settings.py). Ties are broken by layer, by index, by language.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .routes import GENERAL, NOBODY


def layer_relevance(hidden: Tensor, output: Tensor, activation: Literal["scalar", "vector"]) -> Tensor:
    """D [pairs, layers - 1] of Eq. 1: how far the mean activation moves from each layer to the next.

    hidden float64 [pairs, layers, I]: mean post-activation h over a prompt's tokens, then over prompts; `scalar` takes
    its mean over units too. output float64 [pairs, layers, H]: the same means of the FFN's output; `vector` takes the
    Euclidean norm of the difference (a unit has no counterpart in the next layer, a channel of the output has).
    """
    if activation == "scalar":
        return hidden.mean(-1).diff(dim=-1).abs()
    return output.diff(dim=1).norm(dim=-1)


def relevant(relevance: Tensor, k: int, own: bool) -> Tensor:
    """bool [pairs, layers]: the k layers of largest D (Eq. 2), of the mean over pairs or each pair's own.

    D_i credits layer i; the last layer has none and comes last, so that k = layers takes all.
    """
    pairs, layers = relevance.shape[0], relevance.shape[1] + 1
    ranked = relevance if own else relevance.mean(0, keepdim=True).expand(pairs, -1)
    order = torch.cat([ranked, ranked.new_full((pairs, 1), -1.0)], 1).argsort(dim=1, descending=True, stable=True)
    return torch.zeros(pairs, layers, dtype=torch.bool).scatter(1, order[:, :k], True)


def owners(phi: Tensor, general: int, nobody: int) -> Tensor:
    """int16 [units]: GENERAL, NOBODY, or the language of highest awareness, for one layer (Eq. 5).

    phi float64 [languages, units]. Of the units that are above the awareness floor those of lowest variance over
    languages are general; `Landermt.split` gives the counts.
    """
    owner = phi.argmax(0).to(torch.int16)
    owner[phi.amax(0).argsort(stable=True)[:nobody]] = NOBODY
    variance = phi.var(0, correction=0).masked_fill(owner == NOBODY, torch.inf)
    owner[variance.argsort(stable=True)[:general]] = GENERAL
    return owner


def general_share(phi: Tensor, owner: Tensor, own: Tensor) -> Tensor:
    """CAR of Eq. 6, float64 [pairs], for one layer: ΣΦ of general units / ΣΦ of the units that take part.

    phi [languages, units], Φ for a pair being the mean over its two languages; own bool [pairs, languages]. Where no
    unit that takes part has any awareness it is 1.
    """
    mean = own.to(phi) @ phi / own.sum(1, keepdim=True)
    specific = own[:, owner.long().clamp_min(0)] & (owner >= 0)
    general = (mean * (owner == GENERAL)).sum(1)
    total = general + (mean * specific).sum(1)
    return torch.where(total > 0, general / total.where(total > 0, torch.ones_like(total)), 1.0)
