"""Do general units mix the languages, and specific ones part them? LANDeRMT's Fig. 12 and 13.

    slicetune ask projections runs/landermt --layer 10

Pre-activations (what enters the activation: BLOOM's dense_h_to_4h, a gated FFN's gate) of the general and of the
specific units of one layer, averaged over a sentence's tokens, on every language's own sentences: the two directions
of largest variance (principal components), a colour a language. Beside the pictures a number: the share of the variance
that lies between languages, over all units of the kind and over the two components.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...common import distributed
from ...common.errors import UserError
from ...data.batching import Example, batches_by_tokens, pad
from ...data.monolingual import texts_of
from ...data.tokenizer import tokens
from ...evaluation.report.answer import Figure, Table, write
from ...evaluation.report.charts import plane
from ...methods.landermt.routes import GENERAL, ROUTES, Routes
from ...models.attention import inputs_of
from ...models.sites import find_ffns
from ..source import Source, landermt_of

TOKENS = 4096
"""Padded tokens of a batch."""


@dataclass
class Arguments:
    """Two-dimensional projections of general and of specific units' pre-activations, by language."""

    run: str
    """A run of LANDeRMT, its select stage done."""
    layer: int | None = None
    """One of the routed layers; the first of them by default (the paper: 10)."""
    sentences: int = 100
    """Of each language."""

    def __post_init__(self) -> None:
        if self.sentences < 2:
            raise UserError(f"--sentences {self.sentences}: must be at least 2")


def components(x: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Coordinates float64 [samples, count] on the principal components of x [samples, units]; shares of variance.

    A component's sign is that which makes its largest loading positive. Fewer units than `count` give as many.
    """
    x = x.double() - x.double().mean(0)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    count = min(count, len(s))
    largest = v[:count].abs().argmax(1)
    sign = v[torch.arange(count), largest].sign()
    total = s.square().sum()
    share = s[:count].square() / total if total > 0 else torch.zeros(count, dtype=torch.float64)
    return u[:, :count] * s[:count] * sign, share


def between(x: Tensor, group: Tensor) -> float:
    """Share of the variance of x [samples, units] that is of the groups' means, group int64 [samples]; 0 of none."""
    x = x.double() - x.double().mean(0)
    total = float(x.square().sum())
    parts = [x[group == g] for g in group.unique()]
    return float(sum(len(part) * part.mean(0).square().sum() for part in parts)) / total if total else 0.0


def pre_activations(model: nn.Module, layer: int, sentences: list[Example], pad_id: int) -> Tensor:
    """float32 [sentences, I]: the first projection's output, its bias included, averaged over a sentence's tokens."""
    site = find_ffns(model)[layer]
    kept: list[Tensor] = []
    first = getattr(site.module, next(iter(site.projections.values())))
    handle = first.register_forward_hook(lambda module, inputs, output: kept.append(output))
    found = torch.empty(len(sentences), first.out_features)
    try:
        for indices in batches_by_tokens(sentences, TOKENS, packed=False):
            batch = pad([sentences[i] for i in indices], pad_id).to(distributed.device())
            with torch.no_grad():
                model.base_model(**inputs_of(model, batch))
            flat = kept.pop().flatten(0, -2).float()
            for i, (begin, end) in zip(indices, batch.segments.tolist(), strict=True):
                found[i] = flat[begin:end].mean(0).cpu()
    finally:
        handle.remove()
    return found


def answer(given: Arguments) -> None:
    """Writes projections.html and its tables."""
    landermt_of(given.run)
    routes, source = Routes.load(Path(given.run) / ROUTES), Source(given.run)
    layer = routes.layers[0] if given.layer is None else given.layer
    if layer not in routes.layers:
        raise UserError(f"--layer {layer}: the routed layers are {' '.join(map(str, routes.layers))}")
    texts = texts_of(source.directions, given.sentences, source.config.seed)
    sentences, group = [], []
    for i, language in enumerate(routes.languages):
        for number, text in enumerate(texts.sentences[language]):
            sentences.append(Example(tokens.bare(source.tokenizer, text), 1, i, f"{language}/{number}"))
            group.append(i)
    values = pre_activations(source.model(), layer, sentences, source.tokenizer.pad_token_id)
    report(given, routes, layer, values, torch.tensor(group), texts.note)


def report(given: Arguments, routes: Routes, layer: int, values: Tensor, group: Tensor, note: str) -> None:
    """A picture and a row of numbers each of general and of specific units."""
    owner = routes.owner[routes.layers.index(layer)]
    rows, points, figures = [], [], []
    for kind, chosen in (("general", owner == GENERAL), ("specific", owner >= 0)):
        x = values[:, chosen]
        if not x.shape[1]:
            continue
        place, share = components(x)
        place = torch.nn.functional.pad(place, (0, 2 - place.shape[1]))
        rows.append([kind, x.shape[1], between(x, group), between(place, group), float(share.sum())])
        points += [[kind, routes.languages[g], *xy] for g, xy in zip(group.tolist(), place.tolist(), strict=True)]
        series = {name: place[group == i].tolist() for i, name in enumerate(routes.languages)}
        title = f"{kind.capitalize()} units of layer {layer} (Fig. {12 if kind == 'general' else 13})"
        figures.append(Figure(title, plane(series, "first component", "second component")))
    columns = ["units", "count", "between languages", "of the two components", "variance of the two"]
    tables = [
        Table("variance", columns, rows, "Share of the variance that is between languages", 3),
        Table("points", ["units", "language", "first", "second"], points, shown=False),
    ]
    words = f"{len(group):,} sentences; {note}." if note else f"{len(group):,} sentences."
    write(given.run, "projections", "General and specific units by language", words, tables, figures)
