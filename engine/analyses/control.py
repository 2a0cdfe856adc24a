"""A control: how much of the mutual information is the sentences' length, or the domain's name in the prompt?

    slicetune ask control runs/caneft --sentences 400

Domains differ in how long their sentences are, and the prompt names the domain: a score that follows either carries
information about the domain which is not about its language. So the base model scores under several conditions, as many
sentences in each:

    as the run        the run's prompt, sentences as they come
    other sentences   the same with other sentences: how far a choice repeats at all
    matched           every domain has sentences of the same lengths (source and target)
    no name           the prompt does not name the domain
    matched, no name  both
    target tokens     scores of the target's positions alone
    shuffled          the domains dealt out at random: what is left is the floor of a finite sample
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common import distributed
from ..common.errors import UserError
from ..data.batching import Example
from ..data.draws import shuffled
from ..data.records import Pair
from ..evaluation.report.answer import Figure, Table, write
from ..evaluation.report.charts import matrix
from ..methods.caneft.information import consensus, exact_bins, mutual_information
from ..methods.caneft.settings import Caneft
from ..scoring import window
from ..scoring.config import ScoreConfig
from ..scoring.passes import counts_device, score
from ..scoring.statistics import Statistics
from ..slices.neurons import NeuronSet
from ..slices.overlap import share
from .source import Source, caneft_of

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


@dataclass
class Arguments:
    """How much of the mutual information is length, or the domain's name."""

    run: str
    """A CANEFT run: its model, data, prompt and selection are taken."""
    sentences: int = 400
    """A domain in every condition; fewer where not so many can be matched."""
    pool: int = 4000
    """Sentences a domain from which matching ones are looked for."""
    cell: int = 4
    """Lengths match where they fall into the same cell of so many tokens, on both sides."""
    plain_prompt: str = ""
    """The prompt without the domain; by default the run's with the words around {domain} taken out."""

    def __post_init__(self) -> None:
        for name in ("sentences", "pool", "cell"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")


def match(lengths: Sequence[Sequence[tuple[int, int]]], cell: int) -> list[list[int]]:
    """Indices of each domain's sentences such that every domain has equally many in every cell of lengths.

    lengths: (source, target) tokens by domain. A cell is `cell` by `cell` tokens; from each as many sentences are taken
    as the poorest domain has there, a domain's first ones first. All lists are as long; they may be empty.
    """
    cells: list[dict[tuple[int, int], list[int]]] = []
    for domain in lengths:
        found = defaultdict(list)
        for i, (source, target) in enumerate(domain):
            found[source // cell, target // cell].append(i)
        cells.append(found)
    everywhere = [key for key in sorted(cells[0]) if all(key in found for found in cells)]
    kept = {key: min(len(found[key]) for found in cells) for key in everywhere}
    return [[i for key in everywhere for i in found[key][: kept[key]]] for found in cells]


def match_alike(lengths: Sequence[Sequence[tuple[int, int]]], cell: int, limit: int, seed: int) -> list[list[int]]:
    """`match`, thinned to at most `limit` a domain: the same cells in each, drawn with `seed`."""
    chosen = match(lengths, cell)
    places = shuffled(range(len(chosen[0])), "matched", seed)[:limit]  # place k is the same cell in every domain
    return [sorted(indices[place] for place in places) for indices in chosen]


def length_information(lengths: Sequence[Sequence[tuple[int, int]]], method: Caneft) -> tuple[float, float]:
    """Mutual information, nats, of the domain and the decile of the source's and of the target's length."""
    groups = torch.tensor([d for d, domain in enumerate(lengths) for _ in domain])
    sides = torch.tensor([pair for domain in lengths for pair in domain], dtype=torch.float32).T.contiguous()
    source, target = consensus(exact_bins(sides, groups, method.bins), "joint").tolist()
    return source, target


def floor_of(bins: int, domains: int, sentences: int) -> float:
    """Nats that I(B; D) has on average where B and D are independent (Miller 1955): (bins-1)(domains-1) / 2N."""
    return (bins - 1) * (domains - 1) / (2 * sentences)


@dataclass
class Condition:
    """One scoring pass: which sentences, how they are read, and what came out."""

    name: str
    pairs: list[list[Pair]]
    prompt: str = ""
    tokens: str = ""
    shuffle: bool = False
    mi: Tensor | None = None
    neurons: NeuronSet | None = None


def conditions(source: Source, given: Arguments) -> list[Condition]:
    """All conditions, with equally many sentences a domain in each. Raises UserError if nothing can be matched."""
    pool = source.pairs("train", given.pool)
    lengths = [[tokens_of(source, pair) for pair in domain] for domain in pool]
    matched = match_alike(lengths, given.cell, given.sentences, source.config.seed)
    count = len(matched[0])
    if count < 20:
        raise UserError(f"--pool {given.pool} --cell {given.cell}: {count} sentences a domain match: raise either")
    if any(len(domain) < 2 * count for domain in pool):
        count = min(len(domain) for domain in pool) // 2
        matched = [indices[:count] for indices in matched]
    plain = given.plain_prompt or source.without_domain()
    own, other = [domain[:count] for domain in pool], [domain[count : 2 * count] for domain in pool]
    alike = [[domain[i] for i in indices] for domain, indices in zip(pool, matched, strict=True)]
    return [
        Condition("as the run", own),
        Condition("other sentences", other),
        Condition("matched", alike),
        Condition("no name", own, prompt=plain),
        Condition("matched, no name", alike, prompt=plain),
        Condition("target tokens", own, tokens="target"),
        Condition("shuffled", own, shuffle=True),
    ]


def tokens_of(source: Source, pair: Pair) -> tuple[int, int]:
    """Tokens of both sides, without a prompt."""
    ids = source.tokenizer([pair.source, pair.target], add_special_tokens=False)["input_ids"]
    return len(ids[0]), len(ids[1])


def run_condition(source: Source, condition: Condition) -> None:
    """Score its sentences with the base model; fills `mi` (I(B; D) of every neuron) and `neurons`."""
    config, method = source.config, caneft_of(source.config)
    sentences = [e for pairs in condition.pairs for e in source.encode(pairs, "train", condition.prompt)]
    if condition.shuffle:
        sentences = deal(sentences, config.seed)
    scoring: ScoreConfig = replace(source.scoring.score, tokens=condition.tokens or config.score.tokens)
    where = counts_device(scoring, distributed.device())
    pad_id, model = source.tokenizer.pad_token_id, source.model()
    lowest = window.choose(model, sentences, scoring, pad_id)
    stats = Statistics(list(config.data.groups), source.shape, lowest, where)
    rank, world = distributed.rank(), distributed.world()
    score(model, sentences, stats, scoring, pad_id=pad_id, rank=rank, world=world)
    condition.mi = mutual_information(stats, method.bins, method.binning, "joint")
    condition.neurons = method.select(stats, source.shape, source.config.seed)[0]
    distributed.print0(f"{condition.name}: {len(sentences)} sentences scored, median {condition.mi.median():.4f} nats")


def deal(sentences: Sequence[Example], seed: int) -> list[Example]:
    """The sentences with their domains dealt out anew, as many of each as before."""
    order = shuffled(range(len(sentences)), "domains", seed)
    return [replace(one, group=sentences[i].group) for one, i in zip(sentences, order, strict=True)]


def answer(given: Arguments) -> None:
    """Writes control.html and its tables."""
    distributed.start()
    source = Source(given.run)
    caneft_of(source.config)
    found = conditions(source, given)
    for condition in found:
        run_condition(source, condition)
    distributed.first(lambda: report(source, found))
    distributed.stop()


def report(source: Source, found: Sequence[Condition]) -> None:
    """Tables, page, and what they say."""
    method, domains = caneft_of(source.config), len(source.config.data.groups)
    rows = []
    for condition in found:
        sentences = sum(map(len, condition.pairs))
        lengths = [[tokens_of(source, pair) for pair in pairs] for pairs in condition.pairs]
        own = condition.mi[condition.neurons.flat()].median()
        row = [condition.name, sentences // domains]
        row += torch.quantile(condition.mi, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        informed = (None, None) if condition.shuffle else length_information(lengths, method)
        rows.append([*row, float(own), floor_of(method.bins, domains, sentences), *informed])
    names = [f"{q:.0%}" for q in QUANTILES[:-1]]
    columns = ["condition", "a domain", *names, "highest", "chosen, median", "by chance"]
    columns += ["source length", "target length"]
    shares = [[a.name, *(share(a.neurons, b.neurons) for b in found)] for a in found]
    tables = [
        Table("information", columns, rows, "I(B; D) of all neurons by quantile, and of sentence lengths, nats", 4),
        Table("overlap", ["", *(c.name for c in found)], shares, "Of the row's neurons, what the column's has too", 3),
        Table("projections", *_projections(found), "Chosen neurons by projection"),
    ]
    picture = matrix([row[1:] for row in shares], [c.name for c in found])
    figures = [Figure("Chosen neurons in common", picture)]
    write(source.run, "control", "Length and the domain's name", said(rows), tables, figures)


def said(rows: Sequence[Sequence]) -> str:
    """The medians above chance, against the run's own condition."""
    over = {row[0]: row[3] - row[8] for row in rows}
    own = over["as the run"]
    changed = ("matched", "no name", "matched, no name", "target tokens")
    parts = [f"{over[name] / own:.0%} under “{name}”" for name in changed]
    return (
        f"The median neuron has {own:.4f} nats of information above chance as the run scores. Of it there remain "
        f"{', '.join(parts)}. “By chance” is what independent scores would show on average; “shuffled” measures it."
    )


def _projections(found: Sequence[Condition]) -> tuple[list[str], list[list]]:
    counts = [Counter({name: n for (name, _), n in condition.neurons.counts().items()}) for condition in found]
    widths = list(found[0].neurons.widths)
    return ["condition", *widths], [[c.name, *(n[w] for w in widths)] for c, n in zip(found, counts, strict=True)]
