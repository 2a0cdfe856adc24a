"""Memory of one GPU, part by part, by arithmetic: what scoring and training hold. GB is 10⁹ bytes.

Here --model.partition is `on` or `off`: partition.py has decided what `auto` is. Not counted: the CUDA context, the
allocator's fragments. What a block saves was compared with autograd's saved tensors
(tests/engine/run/test_estimate.py). Next: decoding.py, then memory_report.py, which prints it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ....kernels.histogram import BINS
from ...data.languages import languages_of
from ...data.prompts import resolve
from ...models.attention import likely_path
from ...models.shapes import ModelShape
from ...scoring import passes
from ...scoring.cross_entropy import CHUNK
from ..config import RunConfig

PREDICTING = 0.5
"""Share of a batch's positions whose logits are computed; source and target are about as long, the prompt has none."""

CHARACTERS_PER_TOKEN = 3.5
"""Assumed: a tokenizer is not loaded."""
TEMPLATE_TOKENS = 20
"""Assumed: markers that a chat template puts around three turns."""

BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size: stages 2 and 3 keep a buffer of so many gradients and reduce them when it is full."""


@dataclass(frozen=True)
class Part:
    """One line of a memory table; `formula` is the product that `bytes` is."""

    name: str
    formula: str
    bytes: int
    host: bool = False


def device_total(parts: list[Part]) -> int:
    """Bytes on the GPU."""
    return sum(part.bytes for part in parts if not part.host)


def value_bytes(config: RunConfig) -> int:
    """Bytes of a weight or activation on a GPU, where `auto` is bfloat16."""
    return 4 if config.model.dtype == "float32" else 2


def partitioned(config: RunConfig) -> bool:
    """Whether each rank holds its share of the weights alone."""
    return config.model.partition == "on"


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


def activations(
    config: RunConfig, shape: ModelShape, tokens: int, sequence: int, checkpointing: bool | None = None
) -> Part:
    """Saved activations of `tokens` tokens in rows of `sequence`; with checkpointing each block's input, and one block.

    `checkpointing` None takes the run's own choice.
    """
    width, path = value_bytes(config), attention_path(config, shape)
    path = "rows" if path == "sdpa" and sequence < tokens else path  # padded rows have no mask
    block = saved_per_token(shape, width, path, sequence, config.method.saved_values(shape))
    if config.model.activation_checkpointing if checkpointing is None else checkpointing:
        size = tokens * (shape.layers * shape.hidden * width + block)
        formula = f"{tokens:,} tokens × ({shape.layers} inputs of {shape.hidden * width:,} B + one block's {block:,} B)"
        return Part("activations, with checkpointing", formula, size)
    formula = f"{tokens:,} tokens × {shape.layers} blocks × {block:,} B"
    return Part("activations, no checkpointing", formula, tokens * shape.layers * block)


def _transient(config: RunConfig, shape: ModelShape, tokens: int) -> Iterator[Part]:
    """What a backward holds for a moment: a chunk of the logits, and one FFN's gradients."""
    width, rows = value_bytes(config), math.ceil(tokens * PREDICTING)
    chunk, size = min(rows, CHUNK // shape.vocab), 12 if shape.softcap else 8
    formula = f"{chunk:,} of {rows:,} predicting positions × {shape.vocab:,} × {size} B (values, log-probabilities)"
    yield Part("logits", formula, chunk * shape.vocab * size)
    if config.method.sums_head and width == 2:
        formula = f"{shape.vocab:,} × {shape.hidden:,} × 6 B (its sum in fp32, and a chunk's)"
        yield Part("the output head's gradient", formula, shape.vocab * shape.hidden * 6)
    values = (4 if shape.gated else 3) * shape.intermediate + 2 * shape.hidden
    yield Part("one FFN's backward", f"{tokens:,} tokens × {values:,} × {width} B", tokens * values * width)


def scoring_tokens(config: RunConfig) -> int:
    """Tokens of the largest batch while scoring: the budget, or a single sentence that is longer."""
    return max(config.score.tokens_per_batch, config.data.max_length)


def training_sequence(config: RunConfig, shape: ModelShape, tokens: int) -> int:
    """Tokens of a row while training, where a forward's sentences are packed into one; padded where no positions are.

    A scoring batch has rows of a sentence each, or flash-attn, to which the row's length does not matter.
    """
    return tokens if shape.takes_positions else config.data.max_length


def scoring(config: RunConfig, shape: ModelShape, world: int = 1, gpu_memory: int | None = None) -> list[Part]:
    """Memory of one of `world` ranks while scoring: its frozen model, whole or partitioned, and what is summed."""
    tokens = scoring_tokens(config)
    return [
        *_frozen(config, shape, world),
        *([detection(config, shape)] if config.method.routes else _statistics(config, shape, world, gpu_memory)),
        activations(config, shape, tokens, config.data.max_length),
        *_transient(config, shape, tokens),
    ]


def _frozen(config: RunConfig, shape: ModelShape, world: int) -> Iterator[Part]:
    width = value_bytes(config)
    if not partitioned(config):
        yield Part("weights", f"{shape.parameters:,} × {width} B", shape.parameters * width)
        return
    yield Part("weights", f"{shape.parameters:,} × {width} B{_over(world)}", shape.parameters * width // world)
    yield gathered(config, shape)


def gathered(config: RunConfig, shape: ModelShape) -> Part:
    """Whole weights for a moment: of a block, of the next one that is fetched ahead, of the embeddings or the head."""
    width, blocks, head = value_bytes(config), min(2, shape.layers), shape.vocab * shape.hidden
    formula = f"({blocks} × {shape.block_parameters:,} (a block, and one ahead) + {head:,} (output head)) × {width} B"
    return Part("gathered weights", formula, (blocks * shape.block_parameters + head) * width)


def _statistics(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> Iterator[Part]:
    groups, kind = len(config.data.groups), "directions" if config.data.pairs else "domains"
    units, own = shape.layers * shape.intermediate, math.ceil(shape.layers / world)
    owned = f" of {own} of {shape.layers} layers" if world > 1 else ""
    yield Part(
        "histogram counts",
        f"{groups} {kind} × {own * shape.neurons_per_layer:,} neurons{owned} × {BINS} bins × 4 B",
        counts_bytes(config, shape, world),
        host=counts_on_host(config, shape, world, gpu_memory),
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
    beside = parameters if beside is None else beside
    width, stage, p = value_bytes(config), zero_stage(config), f"{parameters:,}"
    weights, gradients = (world if stage == 3 else 1), (world if stage >= 2 else 1)
    parts = [
        Part(
            "weights and slices" if config.method.trains_slices else "weights",
            f"({shape.parameters:,} + {beside:,}) × {width} B{_over(weights)}",
            (shape.parameters + beside) * width // weights,
        ),
        _unreduced(parameters, width, stage),
        Part("fp32 gradients", f"{p} × 4 B{_over(gradients)}", parameters * 4 // gradients),
        Part("fp32 masters, two moments", f"{p} × 12 B{_over(world)}", parameters * 12 // world),
        activations(config, shape, tokens, training_sequence(config, shape, tokens)),
        *_transient(config, shape, tokens),
    ]
    if stage == 3:
        parts.insert(1, gathered(config, shape))
    return parts


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that is trained with: a partitioned model is stage 3's."""
    return 3 if partitioned(config) else config.zero.stage


def loading(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of the whole model on a GPU, which stage 3 without --model.partition loads before it cuts it up."""
    return 0 if partitioned(config) else shape.parameters * value_bytes(config)


def _unreduced(parameters: int, width: int, stage: int) -> Part:
    """Gradients before they are summed over ranks: all of a backward's, or a bucket of them and its fp32 copy."""
    if stage == 1:
        return Part("a backward's gradients", f"{parameters:,} × {width} B", parameters * width)
    copied = min(parameters, BUCKET) if width < 4 else 0
    formula = f"{BUCKET:,} × {width} B, {copied:,} × 4 B (fp32 copy)"
    return Part("a bucket of gradients", formula, BUCKET * width + copied * 4)


def _over(ranks: int) -> str:
    return f" / {ranks} ranks" if ranks > 1 else ""


def counts_bytes(config: RunConfig, shape: ModelShape, world: int = 1) -> int:
    """int32 histogram counts of all seen domains (of all directions where there are several) that a rank owns."""
    return passes.counts_bytes(len(config.data.groups), shape, world)


def counts_threshold(config: RunConfig, shape: ModelShape, world: int = 1) -> float:
    """GPU memory from which `--score.counts auto` keeps the counts on the device."""
    weights = sum(part.bytes for part in _frozen(config, shape, world) if part.name == "weights")
    return weights + counts_bytes(config, shape, world) / passes.FREE_SHARE


def counts_on_host(config: RunConfig, shape: ModelShape, world: int, gpu_memory: int | None) -> bool:
    """Where the counts live; without a known GPU `auto` is taken to be the device, the larger figure."""
    if config.score.counts != "auto":
        return config.score.counts == "host"
    return gpu_memory is not None and gpu_memory < counts_threshold(config, shape, world)


def scoring_tokens_that_fit(config: RunConfig, shape: ModelShape, world: int, gpu_memory: float) -> int:
    """Largest multiple of 64 tokens a batch whose scoring fits in `gpu_memory`; 0 if there is none."""
    tokens = scoring_tokens(config) // 64 * 64
    while tokens > 0:
        smaller = dataclasses.replace(config, score=dataclasses.replace(config.score, tokens_per_batch=tokens))
        if device_total(scoring(smaller, shape, world, int(gpu_memory))) <= gpu_memory:
            return tokens if tokens >= config.data.max_length else 0
        tokens -= 64
    return 0
