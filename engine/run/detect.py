"""The two stages of a LANDeRMT run before training: score counts activations and awareness, select makes routes.

A direction's prompts are its seen domains' training sentences; a language's own sentences are the sides of the same
text (monolingual.py), as many as a direction has at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import distributed
from ..common.errors import UserError
from ..common.settings import fingerprint
from ..data import tokens
from ..data.batching import Example
from ..data.monolingual import Texts, texts_of
from ..methods.landermt import awareness
from ..methods.landermt.detect import detect, prompt_only
from ..methods.landermt.detection import SCORES, Detection
from ..methods.landermt.routes import ROUTES
from ..scoring.progress import Progress
from ..training.metrics import peak_memory

if TYPE_CHECKING:
    from .job import Run


def score(run: Run) -> None:
    """Detect on the base model and write awareness.safetensors. Resumes as scoring does."""
    from tqdm import tqdm

    config, rank, world = run.config, distributed.rank(), distributed.world()
    pairs = tuple(data.pair for data in run.directions)
    asked = [prompt_only(example) for example in run.examples("train", config.data.score_sentences)]
    if not config.data.pairs:  # groups are domains there
        for example in asked:
            example.group = 0
    found = Detection(pairs, run.shape.layers, run.shape.intermediate, run.shape.hidden)
    texts = texts_of(run.directions, config.data.score_sentences * len(config.data.seen), config.seed)
    distributed.print0(texts.note)
    sentences = sentence_examples(run, texts, found.languages)
    identity = {"settings": fingerprint(run.stages.settings), "tokens_per_batch": config.score.tokens_per_batch}
    partial = Progress(run.out, identity, config.score.save_minutes)
    found, done = partial.resume(found)
    total = len(asked) + len(sentences)
    with tqdm(total=total, desc="detect", unit="sentence", mininterval=2, disable=rank != 0) as bar:
        detect(
            run.model(run.base),
            asked,
            sentences,
            found,
            config.score,
            pad_id=run.tokenizer.pad_token_id,
            rank=rank,
            world=world,
            progress=lambda n: bar.update(n * world),
            done=done,
            after_batch=lambda done: partial.after_batch(found, done),
        )
        bar.update(total - bar.n)  # ranks end a few sentences apart
    run.peak = max(run.peak, peak_memory())
    if rank == 0:
        found.save(run.out / SCORES, run.stages.settings | {"text": texts.note, "aligned": texts.aligned})
    partial.clear()


def sentence_examples(run: Run, texts: Texts, languages: tuple[str, ...]) -> list[Example]:
    """Tokenised sentences, trained on from their second token on; too long and empty ones are dropped, and counted.

    Raises UserError for a language without a sentence.
    """
    limit, kept = run.config.data.max_length, []
    for group, language in enumerate(languages):
        ids = [tokens.bare(run.tokenizer, text) for text in texts.sentences[language]]
        own = [(number, tokens) for number, tokens in enumerate(ids, 1) if 1 < len(tokens) <= limit]
        if not own:
            raise UserError(f"{language}: no sentence for its awareness is left: raise --data.max-length")
        if len(own) < len(ids):
            distributed.print0(f"awareness: {len(ids) - len(own)} sentences of {language} dropped, over {limit} tokens")
        kept += [Example(tokens, 1, group, f"{language}/{number}") for number, tokens in own]
    return kept


def select(run: Run) -> None:
    """Make routes of what was detected, print and write them."""
    distributed.first(lambda: _select(run))


def _select(run: Run) -> None:
    routes = awareness.routes(Detection.load(run.out / SCORES), run.config.method)
    routes.provenance["run"] = run.stages.settings
    print(routes.describe(), flush=True)
    routes.save(run.out / ROUTES)
