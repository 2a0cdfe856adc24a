"""The stages of a run that choose what is trained: score, then select. Next: train.py.

Of LANDeRMT a direction's prompts are its seen domains' training sentences; a language's own sentences are the sides of
the same text (data/monolingual.py), as many as a direction has at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common import __version__, distributed
from ..common.errors import UserError
from ..common.output import Bar
from ..common.settings import fingerprint
from ..data.batching import Example
from ..data.examples import show, template_of
from ..data.monolingual import Texts, texts_of
from ..data.tokenizer import tokens
from ..methods.landermt.detect import detect, prompt_only
from ..methods.landermt.detection import Detection
from ..methods.method import Method
from ..models import kinds, load
from ..models.shapes import ModelShape
from ..scoring.progress import Progress
from ..scoring.score import scored
from ..scoring.statistics import Statistics
from .job import Job
from .prompted import warned
from .stages import Stages


def take(stages: Stages, other: Path, artefact: Path) -> None:
    """Leave the scores of the run in folder `other` (--score.reuse) as `artefact`."""
    distributed.first(lambda: stages.take("score", other, artefact))
    distributed.print0(f"the scores of {other} are taken")


def score_neurons(job: Job, examples: Sequence[Example], identity: dict[str, Any]) -> None:
    """Score `examples` on the base model and write statistics.safetensors. `identity` is what they belong to."""
    config, groups = job.scoring.score, job.config.data.groups
    distributed.print0(show(job.tokenizer, examples[0], f"{template_of(job.tokenizer)}: "))
    share, clear = scored(
        lambda: warned(job, job.model()), examples, groups, job.shape, config, job.out, identity, job.pad_id
    )
    share.save(job.out / job.config.method.statistics_file, identity)
    clear()


def detect_units(job: Job, examples: Sequence[Example], identity: dict[str, Any]) -> None:
    """Detect on the base model and write awareness.safetensors. Resumes as scoring does."""
    data, score, rank, world = job.config.data, job.scoring.score, distributed.rank(), distributed.world()
    asked = [prompt_only(example) for example in examples]
    if not data.pairs:  # groups are domains there
        asked = [replace(example, group=0) for example in asked]
    pairs = tuple(one.pair for one in job.directions)
    found = Detection(pairs, job.shape.layers, job.shape.intermediate, job.shape.hidden)
    texts = texts_of(job.directions, data.score_sentences * len(data.seen), job.config.seed)
    distributed.print0(texts.note)
    sentences = sentence_examples(job.tokenizer, texts, found.languages, data.max_length)
    named = [(each.uid, each.input_ids) for each in sentences]
    tokens.check(job.tokenizer, named, job.shape.vocab)
    kinds.look_at_lengths(load.config_json(job.base), named)
    key = {"settings": fingerprint(identity), "tokens_per_batch": score.batch_tokens}
    progress = Progress(job.out, key, score.save_minutes)
    done = progress.resume(found)
    with Bar("detect", len(asked) + len(sentences), "sentence") as bar:
        detect(
            warned(job, job.model()),
            asked,
            sentences,
            found,
            score,
            pad_id=job.pad_id,
            rank=rank,
            world=world,
            progress=bar.add,
            done=done,
            after_batch=lambda done: progress.after_batch(found, done),
        )
    if rank == 0:
        about = identity | {"text": texts.note, "aligned": texts.aligned}
        found.save(job.out / job.config.method.statistics_file, about)
    progress.clear()


def sentence_examples(tokenizer: Any, texts: Texts, languages: Sequence[str], max_length: int) -> list[Example]:
    """Tokenised sentences, trained on from their second token on; too long and empty ones are dropped, and counted.

    Raises UserError for a language without a sentence.
    """
    kept = []
    for group, language in enumerate(languages):
        ids = [tokens.bare(tokenizer, text) for text in texts.sentences[language]]
        own = [(number, tokens) for number, tokens in enumerate(ids, 1) if 1 < len(tokens) <= max_length]
        if not own:
            raise UserError(f"{language!r}: no sentence for its awareness is left: raise --data.max-length")
        if len(own) < len(ids):
            dropped = f"{len(ids) - len(own)} sentences of {language!r} dropped, over {max_length} tokens"
            distributed.print0(f"awareness: {dropped}")
        kept += [Example(tokens, 1, group, f"{language}/{number}") for number, tokens in own]
    return kept


def select(method: Method, out: Path, shape: ModelShape, seed: int, identity: dict[str, Any]) -> None:
    """Leave what the method chooses of the scores in `out`, and print it; the first rank alone calls it."""
    if method.routes:
        chosen, notes = method.routes_of(Detection.load(out / method.statistics_file)), []
    else:
        stats = Statistics.load(out / method.statistics_file) if method.scores else None
        chosen, notes = method.select(stats, shape, seed)
    chosen.provenance.update(slicetune=__version__, run=identity)
    print(chosen.describe(), flush=True)
    for note in notes:
        print(f"warning: {note}", flush=True)
    chosen.save(out / method.chosen_file)
