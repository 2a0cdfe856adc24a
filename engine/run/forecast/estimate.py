"""The dry run: what a run would train, hold in memory and step through, by arithmetic alone.

    python recipes/caneft_llama31.py --dry-run

No weight is read, no network used, nothing written. Every figure is printed with the product that it comes from, and
what is assumed rather than known is said. Memory is in memory_report.py and fit.py, its arithmetic in memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError
from ...common.settings import as_dict
from ...data.config import DataConfig
from ...data.corpus import directions, load_domain
from ...methods.counts import Trainable
from ...models.shapes import ModelShape
from ...slices.neurons import NeuronSet
from ...training.plan import Plan
from ..config import RunConfig
from . import fit, memory, memory_report
from .partition import decided, partition
from .settle import Settled, settle

CHARACTERS_PER_SENTENCE = 100
"""Assumed of each side where no corpus is at hand to measure."""


@dataclass(frozen=True)
class Corpus:
    """Sentences of each seen domain and mean tokens of a sample; `source` says how they were found."""

    scored: dict[str, int]
    trained: dict[str, int]
    tokens: float
    source: str


def chosen(config: RunConfig, shape: ModelShape) -> Trainable:
    """What the run's method trains, with the exact number if the run's folder holds its neurons already.

    Raises UserError if they were chosen for a model of another shape.
    """
    path = Path(config.out) / "neurons.safetensors"
    bounds = config.method.bounds(shape)
    if not (config.method.selects and path.is_file()):
        return bounds

    neurons = NeuronSet.load(path)
    if (neurons.layers, neurons.widths, neurons.fan_in) != (shape.layers, shape.widths, shape.fan_in):
        raise UserError(f"{path}: chosen for a model of another shape than {shape.name}: name another --out")
    exact = neurons.parameters(bias=shape.mlp_bias)
    return Trainable(neurons.count, bounds.minimum, bounds.expectation, bounds.maximum, exact)


def _of_trained(data: DataConfig, sentences: dict[str, int]) -> dict[str, int]:
    """What of `<pair>/<domain>` → sentences is of a direction that is trained."""
    chosen = data.train_pairs
    return {name: count for name, count in sentences.items() if not chosen or name.partition("/")[0] in chosen}


def corpus_of(config: RunConfig) -> Corpus:
    """Sentences and their length: measured where the corpus is a local folder, else assumed."""
    data = config.data
    if data.dir == "tiny" or not Path(data.dir).expanduser().is_dir():
        note = "tiny is made by the run" if data.dir == "tiny" else f"{data.dir} is no local folder, so not read"
        tokens = memory.sample_tokens(config, 2 * CHARACTERS_PER_SENTENCE)
        names = [f"{pair}/{domain}" for pair in data.pairs for domain in data.seen] or data.seen
        scored, trained = (dict.fromkeys(names, n) for n in (data.score_sentences, config.train_sentences))
        trained = _of_trained(data, trained)
        return Corpus(scored, trained, tokens, f"{note}: {CHARACTERS_PER_SENTENCE} characters a side assumed")

    scored, characters = {}, 0
    most = max(data.score_sentences, config.train_sentences)
    for one in directions(data):
        for domain in one.seen:
            pairs = load_domain(one, domain, "train", limit=most, seed=config.seed)
            scored[one.name(domain)] = len(pairs)
            characters += sum(len(pair.source) + len(pair.target) for pair in pairs)
    trained = _of_trained(data, {name: min(number, config.train_sentences) for name, number in scored.items()})
    scored = {domain: min(number, data.score_sentences) for domain, number in scored.items()}
    mean = characters / max(1, sum(scored.values()))
    return Corpus(scored, trained, memory.sample_tokens(config, mean), f"{data.dir} has {mean:.0f} characters a pair")


def dry_run_text(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None = None) -> str:
    """The whole dry run as text; `gpu_memory` is one GPU's in bytes, None where there is none to ask."""
    corpus, neurons = corpus_of(config), chosen(config, shape)
    plan, method = Plan.of(config.train, sum(corpus.trained.values()), world), config.method
    on, why = partition(config, shape, world, gpu_memory)
    given, config = config, decided(config, on)
    settled = settle(config, shape, world, gpu_memory, neurons)
    scoring, training = settled.scoring, settled.training
    gpu = (
        f"{gpu_memory / 1e9:.1f} GB each"
        if gpu_memory is not None
        else "no GPU here to ask: --gpu-memory says what fits"
    )
    sections = (
        [
            f"Dry run of {shape.name} on {world} GPU(s), one rank each ({gpu}): no weights, no network, no files",
            why,
            *method.notes(shape),
        ],
        _settings(given, _resolved(config, shape, plan) | _settled(settled)),
        _neurons(config, shape, neurons) if method.selects else _parameters(config, shape, neurons),
        memory_report.scoring(scoring, shape, world, gpu_memory) if scoring else [],
        memory_report.training(training, shape, world, neurons, gpu_memory) if training else [],
        memory_report.decoding(config, shape, world, gpu_memory),
        _steps(config, corpus, plan, world) if method.trains else [],
        fit.table(fit.Load(given, shape, world, neurons, gpu_memory)) if gpu_memory else [],
    )
    return "\n\n".join("\n".join(section) for section in sections if section)


def _resolved(config: RunConfig, shape: ModelShape, plan: Plan) -> dict[str, object]:
    """What settings that leave the value to the run turn out to be."""
    path = memory.attention_path(config, shape)
    if path == "eager" and shape.softcap:
        path += ", as neither varlen nor sdpa caps logits: slicetune[flash] saves the matrix of scores"
    resolved: dict[str, object] = {"model.attention": path, "model.partition": config.model.partition}
    if config.model.dtype == "auto":
        resolved["model.dtype"] = "bfloat16 on a GPU"
    derived = {
        "micro_batch_size": plan.micro_batch,
        "max_steps": plan.steps,
        "eval_steps": plan.updates_per_epoch,
        "save_steps": plan.updates_per_epoch,
    }
    if config.model.quantize != "none" and config.evaluate.on == "auto":
        resolved["evaluate.on"] = "quantised"
    return resolved | {f"train.{name}": value for name, value in derived.items() if not getattr(config.train, name)}


def _settled(settled: Settled) -> dict[str, object]:
    """The values of each stage; of both where they differ."""
    found: dict[str, object] = {}
    if settled.scoring and not settled.scoring.config.method.routes:
        found["score.counts"] = settled.scoring.config.score.counts
    for name in ("score.tokens_per_batch", "model.activation_checkpointing"):
        part, _, field = name.partition(".")
        training = "for the dev loss" if part == "score" else "while training"
        stages = {"while scoring": settled.scoring, training: settled.training}
        values = {when: getattr(getattr(stage.config, part), field) for when, stage in stages.items() if stage}
        same = len(set(values.values())) == 1
        each = ", ".join(f"{value} {when}" for when, value in values.items())
        found |= {name: next(iter(values.values())) if same else each} if values else {}
    return found


def _settings(config: RunConfig, resolved: dict[str, object]) -> list[str]:
    def leaves(value: object, prefix: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{prefix}.{key}" if prefix else key)
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix, text if str(resolved.get(prefix, text)) == text else f"{text} → {resolved[prefix]}"

    pairs = list(leaves(as_dict(config), ""))
    width = max(len(name) for name, _ in pairs)
    return ["Settings", *(f"  {name:{width}}  {value}".rstrip() for name, value in pairs)]


def _parameters(config: RunConfig, shape: ModelShape, counts: Trainable) -> list[str]:
    """Of a method that selects no neurons: its numbers are known."""
    share = f"= {100 * counts.minimum / shape.parameters:.2f} % of the model"
    return [
        f"Parameters of {config.method.title}",
        f"  parameters  {shape.parameters:>15,}  in the model",
        f"  trainable   {counts.minimum:>15,}  {share}",
        f"  added       {counts.added:>15,}  that the base does not have",
    ]


def _neurons(config: RunConfig, shape: ModelShape, chosen: Trainable) -> list[str]:
    widths = " + ".join(f"{width:,} {name}" for name, width in shape.widths.items())
    costs = ", ".join(f"{name} {weights:,}" for name, weights in shape.slice_weights.items())
    saved = Path(config.out) / "neurons.safetensors"
    picked = "from --out" if saved.is_file() else config.method.how_many()

    def row(name: str, value: float, note: str) -> str:
        return f"  {name:11} {round(value):>15,}  = {100 * value / shape.parameters:.2f} % of the model; {note}"

    lines = [
        "Neurons and trainable parameters",
        f"  parameters  {shape.parameters:>15,}  in the model",
        f"  neurons     {shape.neurons:>15,}  = {shape.layers} layers × ({widths})",
        f"  chosen      {chosen.neurons:>15,}  {picked}; weights of one: {costs}",
    ]
    if chosen.minimum < chosen.maximum:
        ratio = f"{100 * config.method.neuron_ratio:g} %"
        lines += [
            row("minimum", chosen.minimum, f"{ratio} of the neurons, the cheapest"),
            row("expectation", chosen.expectation, f"{ratio} at random"),
            row("maximum", chosen.maximum, f"{ratio}, the dearest"),
        ]
    if chosen.exact is not None:
        lines.append(row("exact", chosen.exact, str(saved) if saved.is_file() else config.method.title))
    return lines


def _steps(config: RunConfig, corpus: Corpus, plan: Plan, world: int) -> list[str]:
    """Sentences, tokens and optimizer steps of an epoch and in all."""

    def row(name: str, sentences: dict[str, int]) -> str:
        number = sum(sentences.values())
        domains = ", ".join(f"{domain} {count:,}" for domain, count in sentences.items())
        return f"  {name}  {number:,} sentences, about {number * corpus.tokens:,.0f} tokens ({domains})"

    epochs = plan.steps / plan.updates_per_epoch
    share = f"{world} rank(s) × {plan.accumulation} forward(s) × up to {plan.micro_batch}"
    return [
        "Sentences, tokens and optimizer steps",
        f"  a sample  about {corpus.tokens:.0f} tokens ({corpus.source}; "
        f"{memory.CHARACTERS_PER_TOKEN} a token assumed)",
        *([row("scored  ", corpus.scored)] if config.method.scores else []),
        row("an epoch", corpus.trained),
        f"  a step    {config.train.global_batch_size} sentences = {share}",
        f"  an epoch  {plan.updates_per_epoch:,} optimizer steps",
        f"  in all    {plan.steps:,} optimizer steps, {epochs:g} epoch(s), "
        f"about {epochs * plan.sentences * corpus.tokens:,.0f} tokens",
    ]
