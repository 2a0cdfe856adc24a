"""Memory of one GPU, part by part, by arithmetic: what scoring and training hold. GB is 10⁹ bytes.

Here --model.partition is `on` or `off`: partition.py has decided what `auto` is. Not counted: the CUDA context, the
allocator's fragments. What a block saves was compared with autograd's saved tensors
(tests/engine/run/test_estimate.py). A setting that is still `auto` counts as the fastest there is: settle.py decides.
Next: decoding.py, then memory_report.py, which prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ....kernels.histogram import BINS
from ...data.languages import languages_of
from ...data.prompts import resolve
from ...methods.counts import Trainable
from ...models.attention import likely_path
from ...models.shapes import ModelShape
from ...scoring import passes
from ...scoring.cross_entropy import CHUNK
from ...training.plan import Plan
from ..config import RunConfig
from .weights import Part, device_total, held, over, partitioned, passing, value_bytes

__all__ = ["Part", "device_total", "partitioned", "value_bytes"]

PREDICTING = 0.5
"""Share of a batch's positions whose logits are computed; source and target are about as long, the prompt has none."""

CHARACTERS_PER_TOKEN = 3.5
"""Assumed: a tokenizer is not loaded."""
TEMPLATE_TOKENS = 20
"""Assumed: markers that a chat template puts around three turns."""

BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size: stages 2 and 3 keep a buffer of so many gradients and reduce them when it is full."""


def sample_tokens(config: RunConfig, characters: float) -> float:
    """Tokens of a sample: both sides, the prompt's text and the template's markers; at most the limit."""
    prompt = resolve(config.data)
    text = len(prompt.system) + len(prompt.user) + len(prompt.target)
    return min(config.data.max_length, (characters + text) / CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS)


def attention_path(config: RunConfig, shape: ModelShape) -> str:
    """What attention a run takes on a GPU."""
    return likely_path(config.model.attention, value_bytes(config) == 2, shape)


def saved_per_token(shape: ModelShape, width: int, attention: str, sequence: int, ffn: int | None = None) -> int:
    """Bytes that one block saves of one token for its backward; `width` is 4 or 2 bytes a value.

    Norms save their input (transformers' RMSNorm in fp32); the FFN its pre-activations and one vector of the model's
    width, x while training, y while scoring. `flash`, `varlen` and `rows` (sdpa without a mask) save q, k, v, the
    output and a log-sum a head; `sdpa` keys and values repeated for every head and a row of the mask; `eager` those, no
    output, and `sequence` scores a head. `ffn` is how many values a token the fused FFN's part really are, where a
    method runs the model's own modules.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.norms * shape.hidden * (4 if shape.norm_in_fp32 else width)
    ffn = ((2 if shape.gated else 1) * shape.intermediate + shape.hidden if ffn is None else ffn) * width
    if attention == "eager":  # fp32 softmax and its cast, the capped logits and their tanh
        score = 4 + (width if width == 2 else 0) + (width if shape.softcap else 0)
        return norms + ffn + 3 * queries * width + shape.heads * sequence * score
    if attention == "sdpa":
        return norms + ffn + 4 * queries * width + 4 * shape.heads + sequence * width
    return norms + ffn + 2 * (queries + keys) * width + 4 * shape.heads


def activations(config: RunConfig, shape: ModelShape, tokens: int, sequence: int, ffn: int | None = None) -> Part:
    """Saved activations of `tokens` tokens in rows of `sequence`; with checkpointing each block's input, and one block.

    `ffn` is `saved_per_token`'s.
    """
    width, path = value_bytes(config), attention_path(config, shape)
    path = "rows" if path == "sdpa" and sequence < tokens else path  # padded rows have no mask
    block = saved_per_token(shape, width, path, sequence, ffn)
    if config.model.checkpoints:
        size = tokens * (shape.layers * shape.hidden * width + block)
        formula = f"{tokens:,} tokens × ({shape.layers} inputs of {shape.hidden * width:,} B + one block's {block:,} B)"
        return Part("activations, with checkpointing", formula, size)
    formula = f"{tokens:,} tokens × {shape.layers} blocks × {block:,} B"
    return Part("activations, no checkpointing", formula, tokens * shape.layers * block)


def _logits(shape: ModelShape, tokens: int) -> Part:
    rows = math.ceil(tokens * PREDICTING)
    chunk, size = min(rows, CHUNK // shape.vocab), 12 if shape.softcap else 8
    formula = f"{chunk:,} of {rows:,} predicting positions × {shape.vocab:,} × {size} B (values, log-probabilities)"
    return Part("logits", formula, chunk * shape.vocab * size)


def _transient(config: RunConfig, shape: ModelShape, tokens: int, again: bool = False) -> Iterator[Part]:
    """What a backward holds for a moment: a chunk of the logits, one FFN's gradients, and what it computes `again`."""
    width, first = value_bytes(config), 2 if shape.gated else 1
    yield _logits(shape, tokens)
    if config.method.sums_head and width == 2:
        formula = f"{shape.vocab:,} × {shape.hidden:,} × 6 B (its sum in fp32, and a chunk's)"
        yield Part("the output head's gradient", formula, shape.vocab * shape.hidden * 6)
    values = (first + 2 + again * first) * shape.intermediate + 2 * shape.hidden
    yield Part("one FFN's backward", f"{tokens:,} tokens × {values:,} × {width} B", tokens * values * width)
    yield from passing(config, shape, tokens)


def scoring_tokens(config: RunConfig) -> int:
    """Tokens of the largest batch while scoring: the budget, or a single sentence that is longer."""
    return max(config.score.batch_tokens, config.data.max_length)


def training_sequence(config: RunConfig, shape: ModelShape, tokens: int) -> int:
    """Tokens of a row while training, where a forward's sentences are packed into one; padded where no positions are.

    A scoring batch has rows of a sentence each, or flash-attn, to which the row's length does not matter.
    """
    return tokens if shape.takes_positions else config.data.max_length


def scoring(config: RunConfig, shape: ModelShape, world: int = 1) -> list[Part]:
    """Memory of one of `world` ranks while scoring: its frozen model, whole or partitioned, and what is summed."""
    tokens = scoring_tokens(config)
    return [
        *held(config, shape, world if partitioned(config) else 0),
        *([detection(config, shape)] if config.method.routes else _statistics(config, shape, world)),
        activations(config, shape, tokens, config.data.max_length, config.method.saved_values(shape)),
        *_transient(config, shape, tokens),
    ]


def _statistics(config: RunConfig, shape: ModelShape, world: int) -> Iterator[Part]:
    groups, kind = len(config.data.groups), "directions" if config.data.pairs else "domains"
    units, own = shape.layers * shape.intermediate, math.ceil(shape.layers / world)
    owned = f" of {own} of {shape.layers} layers" if world > 1 else ""
    yield Part(
        "histogram counts",
        f"{groups} {kind} × {own * shape.neurons_per_layer:,} neurons{owned} × {BINS} bins × 4 B",
        counts_bytes(config, shape, world),
        host=config.score.counts == "host",
    )
    if world > 1:
        samples = math.ceil(scoring_tokens(config) / sample_tokens(config, 0))
        formula = f"2 × {samples} samples at most × {shape.neurons:,} neurons × 1 B (to their owners, and from others)"
        yield Part("bins of a batch", formula, 2 * samples * shape.neurons)
    formula = f"{groups} {kind} × ({shape.neurons:,} neurons × 8 B + {units:,} units × 16 B)"
    yield Part("sums", formula, groups * (shape.neurons * 8 + units * 16))


def detection(config: RunConfig, shape: ModelShape) -> Part:
    """LANDeRMT's sums, on the host: activations by direction, awareness by language (detection.py)."""
    pairs = config.data.pairs or (config.data.pair,)
    languages, channels = len(languages_of(pairs)), shape.layers * (shape.intermediate + shape.hidden)
    units = shape.layers * shape.intermediate
    formula = f"({len(pairs)} directions × {channels:,} + {languages} languages × {units:,} units) × 8 B"
    return Part("sums", formula, 8 * (len(pairs) * channels + languages * units), host=True)


def training(
    config: RunConfig, shape: ModelShape, world: int, parameters: int, tokens: int, beside: int | None = None
) -> list[Part]:
    """Memory of one rank while `parameters` weights are trained on `world` ranks, `tokens` in a forward.

    `beside` are those kept beside the model: slices, adapters, new blocks (None: all of them; 0 where all are its own).
    """
    again = config.model.recompute_ffn and config.method.trains_slices
    ffn = shape.hidden if again else config.method.saved_values(shape)
    return [
        *_state(config, shape, world, parameters, parameters if beside is None else beside),
        activations(config, shape, tokens, training_sequence(config, shape, tokens), ffn),
        *_transient(config, shape, tokens, again),
    ]


def micro_batch(config: RunConfig, world: int) -> int:
    """Sentences of a forward."""
    return Plan.of(config.train, 1, world).micro_batch


def trained(config: RunConfig, shape: ModelShape, world: int, counts: Trainable) -> list[Part]:
    """`training` of what a method trains, of the longest sentences that a forward can have."""
    tokens = micro_batch(config, world) * config.data.max_length
    return training(config, shape, world, counts.likely, tokens, config.method.beside(counts))


def dev_loss(config: RunConfig, shape: ModelShape, world: int, counts: Trainable) -> list[Part]:
    """Memory of one rank while it computes the dev loss, a forward in batches as in scoring, in the midst of training.

    Nothing is saved for a backward: of a block there are its values of the moment.
    """
    width, tokens = value_bytes(config), scoring_tokens(config)
    values = 3 * shape.intermediate + 4 * shape.hidden
    return [
        *_state(config, shape, world, counts.likely, config.method.beside(counts)),
        Part("one block's values", f"{tokens:,} tokens × {values:,} × {width} B", tokens * values * width),
        _logits(shape, tokens),
        *passing(config, shape, tokens, backward=False),
    ]


def _state(config: RunConfig, shape: ModelShape, world: int, parameters: int, beside: int) -> Iterator[Part]:
    """What stays from update to update: weights, gradients, masters, moments."""
    stage, p = zero_stage(config), f"{parameters:,}"
    weights, gradients = (world if stage == 3 else 0), (world if stage >= 2 else 1)
    yield from held(config, shape, weights, beside, "weights and slices" if config.method.trains_slices else "weights")
    yield _unreduced(parameters, value_bytes(config), stage)
    yield Part("fp32 gradients", f"{p} × 4 B{over(gradients)}", parameters * 4 // gradients)
    yield Part("fp32 masters, two moments", f"{p} × 12 B{over(world)}", parameters * 12 // world)


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that is trained with: a partitioned model is stage 3's."""
    return 3 if partitioned(config) else config.zero.stage


def loading(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of the whole model on a GPU, which stage 3 without --model.partition loads before it cuts it up; else 0."""
    whole = zero_stage(config) == 3 and not partitioned(config)
    return shape.parameters * value_bytes(config) if whole else 0


def _unreduced(parameters: int, width: int, stage: int) -> Part:
    """Gradients before they are summed over ranks: all of a backward's, or a bucket of them and its fp32 copy."""
    if stage == 1:
        return Part("a backward's gradients", f"{parameters:,} × {width} B", parameters * width)
    copied = min(parameters, BUCKET) if width < 4 else 0
    formula = f"{BUCKET:,} × {width} B, {copied:,} × 4 B (fp32 copy)"
    return Part("a bucket of gradients", formula, BUCKET * width + copied * 4)


def counts_bytes(config: RunConfig, shape: ModelShape, world: int = 1) -> int:
    """int32 histogram counts of all seen domains (of all directions where there are several) that a rank owns."""
    return passes.counts_bytes(len(config.data.groups), shape, world)
