"""Where the paper can be read in more than one way: does another reading than the run's train a better model?

    slicetune ask readings runs/caneft --train-sentences 400 --seeds 0 1 2
    torchrun --nproc_per_node 8 -m slicetune.engine ask readings runs/caneft

Every reading chooses its neurons (a scoring pass is shared by all that score alike), trains them as the run did, at the
rate that the run took, and is compared with the run's own by the cross-entropy of each dev sentence. Beside them stand
as many neurons drawn at random (RCN) and the untrained model. The best readings are trained with further seeds and
decoded. Stopped, it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common import distributed, signals
from ..common.errors import UserError
from ..common.settings import fingerprint, of_stage
from ..evaluation.report.answer import Figure, folder_of, write
from ..evaluation.report.charts import intervals
from ..methods.caneft.settings import Rcn
from ..run.config import RunConfig
from ..run.run import Run, run_one
from ..slices.neurons import NeuronSet
from ..slices.overlap import share
from .paired import paired, sentence_losses
from .source import Source, caneft_of, finished
from .verdicts import Reading, Result, Seeds, seed_table, seeds_agree, table


@dataclass
class Arguments:
    """Train every reading of the paper on a run's text and compare them."""

    run: str
    """A finished CANEFT run: its settings are what every reading shares, and its own reading is the default."""
    consensus: tuple[str, ...] = ("specific", "one_vs_rest", "joint")
    task_ratios: tuple[float | None, ...] = (None, 0.1, 0.2, 0.5)
    """Each with each consensus."""
    train_sentences: int = 0
    """A domain; 0 is as many as the run's."""
    dev_sentences: int = 0
    """A domain, for the comparison; 0 is as many as the run's."""
    test_sentences: int = 0
    """A domain, to decode the best with; 0 is as many as the run's."""
    best: int = 3
    """Readings that are trained with every seed and decoded."""
    seeds: tuple[int, ...] = field(default_factory=lambda: (0, 1, 2))
    """The first one compares all readings. A seed draws the sentences and their order."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: name one or more, each once")
        if self.best < 0:
            raise UserError(f"--best {self.best}: must be at least 0")
        for name in self.consensus:
            if name not in ("specific", "one_vs_rest", "joint"):
                raise UserError(f"--consensus {name}: there are specific, one_vs_rest and joint")


def readings(config: RunConfig, consensus: Sequence[str], task_ratios: Sequence[float | None]) -> list[Reading]:
    """The run's own reading, one setting changed at a time, every consensus with every task ratio; each once."""
    own, score = caneft_of(config), config.score
    found = [Reading("default", own, score), Reading("random neurons", Rcn(**asdict(own)), score)]
    for name, values in (("tokens", ("all", "target")), ("token_reduce", ("mean_abs", "abs_sum"))):
        found += [Reading(f"{name} {value}", own, replace(score, **{name: value})) for value in values]
    found += [
        Reading(f"task merge {merge}", replace(own, task_merge=merge), score)
        for merge in ("mean", "intersection", "union")
    ]
    for ratio in sorted(task_ratios, key=lambda ratio: ratio not in (None, own.task_ratio)):  # the paper's own first
        for kind in consensus:
            name = f"{kind}, task ratio {'none' if ratio is None else f'{ratio:g}'}"
            found.append(Reading(name, replace(own, consensus=kind, task_ratio=ratio), score))
    once: dict[str, Reading] = {}
    for reading in found:
        once.setdefault(reading.folder, reading)
    return list(once.values())


class Trainer:
    """Trains readings under `RUN/analyses/readings/` and keeps their losses by dev sentence."""

    def __init__(self, arguments: Arguments) -> None:
        self.source = Source(arguments.run)
        self.rate = finished(self.source.run)["learning_rate"]  # a sweep for each of twenty readings is not worth it
        data = self.source.config.data
        given = {name: getattr(arguments, name) for name in ("train_sentences", "dev_sentences", "test_sentences")}
        self.data = replace(data, **{name: value for name, value in given.items() if value})
        if not self.data.dev_sentences:
            raise UserError("--dev-sentences 0: readings are compared by the loss of dev sentences; the run has none")
        self.root = distributed.first_rank_first(lambda: folder_of(arguments.run)) / "readings"
        self.dev = self.source.examples("dev", self.data.dev_sentences)
        self.scored: dict[str, Path] = {}
        self.losses: dict[tuple[int, str], Tensor] = {}

    def config(self, reading: Reading, seed: int) -> RunConfig:
        """Settings of one training. Statistics are taken from where the same sentences were scored the same way."""
        config = replace(
            self.source.config,
            out=str(self.root / f"seed-{seed}" / reading.folder),
            seed=seed,
            data=self.data,
            method=reading.method,
            train=replace(self.source.config.train, learning_rate=self.rate, sweep=()),
            evaluate=replace(self.source.config.evaluate, base=False),
        )
        own, asked = (of_stage(score, "score") for score in (self.source.config.score, reading.score))
        key = fingerprint([seed, asked])
        if seed == self.source.config.seed and asked == own:
            self.scored.setdefault(key, self.source.run)
        where = self.scored.setdefault(key, Path(config.out))
        return replace(config, score=replace(reading.score, reuse="" if where == Path(config.out) else str(where)))

    def neurons(self, reading: Reading, seed: int) -> NeuronSet:
        """What the reading chooses."""
        config = self.config(reading, seed)
        run_one(config, Run.to_chosen)
        return NeuronSet.load(Path(config.out) / "neurons.safetensors")

    def train(self, reading: Reading, seed: int, neurons: NeuronSet) -> Tensor:
        """Losses [dev sentences] after training; a set that was trained before is not trained again."""
        key = seed, neurons.fingerprint
        if key not in self.losses:
            config = self.config(reading, seed)
            run_one(config, Run.to_model)
            self.losses[key] = self.evaluate(Path(config.out) / "model")
        return self.losses[key]

    def evaluate(self, folder: Path | None) -> Tensor:
        """Losses [dev sentences] of the model in `folder`; of the base if that is None."""
        model = self.source.model(folder or self.source.base)
        return sentence_losses(
            model, self.dev, self.source.tokenizer.pad_token_id, self.source.scoring.score.batch_tokens
        )[0]

    def decode(self, reading: Reading, seed: int) -> dict[str, dict[str, float]]:
        """BLEU and chrF, averages over seen, unseen and all domains."""
        return distributed.share_object(run_one(self.config(reading, seed)))["systems"][reading.method.kind]["averages"]


def answer(given: Arguments) -> None:
    """Trains, compares, writes readings.html and two tables as CSV."""
    signals.install()
    distributed.start()
    trainer = Trainer(given)
    names = readings(trainer.source.config, given.consensus, given.task_ratios)
    first = compare_all(trainer, names, given.seeds[0])
    again = with_seeds(trainer, first, given.best, given.seeds) if given.best else []
    distributed.first(lambda: report(given, first, again))
    distributed.stop()


def compare_all(trainer: Trainer, names: Sequence[Reading], seed: int) -> list[Result]:
    """Every reading with one seed; the default first, the untrained base last (without a reading of its own)."""
    found: list[Result] = []
    for reading in names:
        neurons = trainer.neurons(reading, seed)
        losses = trainer.train(reading, seed, neurons)
        default = found[0] if found else Result(reading, neurons, losses, paired(losses, losses), 1.0)
        shared = share(neurons, default.neurons)
        found.append(Result(reading, neurons, losses, paired(losses, default.losses), shared))
        v = found[-1].versus
        distributed.print0(f"{reading.name}: {losses.mean():.4f}, {v.difference:+.4f} ({v.low:+.4f} to {v.high:+.4f})")
    base = trainer.evaluate(None)
    untrained = replace(names[0], name="untrained base")
    return [*found, Result(untrained, None, base, paired(base, found[0].losses), 0.0)]


def with_seeds(trainer: Trainer, first: Sequence[Result], best: int, seeds: Sequence[int]) -> list[Seeds]:
    """The default and the `best` other readings by loss with every seed, decoded."""
    other = [r for r in first[1:] if r.tested and r.neurons != first[0].neurons]
    ranked = sorted({r.neurons.fingerprint: r for r in reversed(other)}.values(), key=lambda r: r.versus.difference)
    found = []
    for result in (first[0], *ranked[:best]):
        losses, scores = [], []
        for seed in seeds:
            neurons = trainer.neurons(result.reading, seed)
            losses.append(trainer.train(result.reading, seed, neurons))
            scores.append(trainer.decode(result.reading, seed))
        found.append(Seeds(result.reading.name, torch.stack(losses), scores))
    return found


def report(given: Arguments, first: Sequence[Result], again: Sequence[Seeds]) -> None:
    """Tables, page and verdict."""
    tables = [table(first)]
    bars = [(r.reading.name, r.versus.difference, r.versus.low, r.versus.high) for r in first[1:-1]]
    figures = [Figure("Dev loss minus the default's", intervals(bars, "nats a target token, 95 % interval"))]
    words = (
        f"{len(first[0].losses)} dev sentences; a sentence's loss is the mean over its target tokens. p is Holm's over "
        "all readings; random neurons and the untrained base have a p of their own. "
    )
    if again:
        tables.append(seed_table(again))
        better = [s.name for s in again[1:] if seeds_agree(s, again[0])[2]]
        which = f"over sentences and over {len(again[0].scores)} seeds"
        words += f"Better than the default {which}: {', '.join(better) or 'none of the best'}."
    write(given.run, "readings", "Readings of the paper", words, tables, figures)
