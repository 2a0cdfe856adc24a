"""A run as one tree of dataclasses: what the command line sets and `config.json` stores.

    torchrun --nproc_per_node 8 recipes/caneft_llama31.py --data.dir DATA --out runs/caneft-de-en

Field names follow Hugging Face's TrainingArguments where it has one. Each field is followed by its documentation,
which is also its help on the command line (tyro). settings.py turns the tree into JSON and back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UserError
from .methods.caneft import Caneft
from .methods.kinds import AnyMethod
from .methods.lora import Lora


def check_bounds(config: Any, part: str, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises UserError, naming the flag, for a field outside its closed range, or that is no number."""
    for name, (low, high) in bounds.items():
        if not low <= getattr(config, name) <= high:  # NaN is in no range
            flag = f"--{part}.{name.replace('_', '-')} {getattr(config, name)}"
            raise UserError(f"{flag}: must be {f'{low} to {high}' if high < math.inf else f'at least {low}'}")


@dataclass
class ModelConfig:
    """Which model, and how it is loaded."""

    path: str = "tiny"
    """A Hugging Face folder, a hub id, or `tiny`: a small Llama that is generated and pretrained on the spot, German to
    English; `tiny-pairs` translates both ways."""
    attention: Literal["auto", "flash", "varlen", "sdpa", "eager"] = "auto"
    """`auto` takes on a GPU flash-attn where it is installed, else torch's own attention over packed rows (`varlen`)
    where it can, else, and on a CPU, torch's sdpa; the chosen path is printed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU (fp32 masters for the slices), float32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    recompute_ffn: bool = False
    """Keep an FFN's input alone and compute gate and up again: an eighth of its memory, a third more FFN time."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks`: torch.compile each decoder block for training, at ZeRO stages 1 and 2; the first updates wait for the
    compiler. Scoring, dev loss and decoding run uncompiled."""


@dataclass
class DataConfig:
    """Which sentences, and how they become prompts."""

    dir: str = "tiny"
    """A folder `<pair>/<domain>/<split>.jsonl[.gz]`, line-aligned `<split>.<lang>[.gz]`, a hub id, or `tiny`."""
    pair: str = "de-en"
    """Source-target. The folder may name the pair the other way round."""
    pairs: tuple[str, ...] = ()
    """Several directions in one run, as in `de-en en-de`, in the place of `pair`: results and statistics are theirs."""
    train_pairs: tuple[str, ...] = ()
    """Those of `pairs` that are trained, all being scored and decoded; empty is all."""
    seen: tuple[str, ...] = ("it", "law", "medical", "subtitles")
    """Domains that are scored and trained. Of several directions each takes those of them that the corpus has of it."""
    unseen: tuple[str, ...] = ("koran",)
    """Domains that are only evaluated."""
    prompt: str = "released"
    """System text: `released`, `paper`, `short`, or a text of your own with {src}, {tgt} and {domain}; `templates`: one
    of ten for each sentence, drawn with the seed, the same in scoring, training and decoding."""
    score_sentences: int = 10_000
    """Sentences a seen domain, and of each direction, that are scored (the paper: 10k)."""
    train_sentences: int = 2_000
    """Sentences a seen domain, and of each direction, that a method that chooses neurons trains on (the paper: 2k)."""
    budget: Literal["paper", "equal"] = "paper"
    """`paper`: methods that choose no neurons train on all --data.score-sentences; `equal`: all on the same ones."""
    dev_sentences: int = 200
    """Sentences a seen domain, and of each direction, for the dev loss."""
    test_sentences: int = 0
    """Sentences a domain, and of each direction, that are decoded; 0 is all."""
    test_split: Literal["test", "dev"] = "test"
    """Which split is decoded and measured; `dev` where a corpus has no test files."""
    test_dir: str = ""
    """Where the test split lies if not in --data.dir: another corpus, of the same pair and domains."""
    max_length: int = 512
    """Tokens of prompt and target together; longer sentences are counted and dropped."""
    max_dropped: float = 0.01
    """Share of broken records that is tolerated before a file is refused."""

    def __post_init__(self) -> None:
        for flag, pair in (("--data.pair", self.pair), *(("--data.pairs", pair) for pair in self.pairs)):
            if pair.count("-") != 1 or not all(pair.split("-")):
                raise UserError(f"{flag} {pair!r}: write source-target, as in de-en")
        if twice := [pair for pair, count in Counter(self.pairs).items() if count > 1]:
            raise UserError(f"--data.pairs names {' '.join(twice)} more than once: name each direction once")
        if strange := [pair for pair in self.train_pairs if pair not in self.pairs]:
            raise UserError(f"--data.train-pairs {' '.join(strange)}: not in --data.pairs {' '.join(self.pairs)}")
        if not self.seen:
            raise UserError("--data.seen is empty: name at least one domain to train on")
        both = sorted(set(self.seen) & set(self.unseen))
        if both:
            raise UserError(f"--data.unseen names {' '.join(both)}, which --data.seen names too: keep each in one list")
        for name in (*self.domains, *(code for pair in (self.pair, *self.pairs) for code in pair.split("-"))):
            if not re.fullmatch(r"\w[\w.+ -]*", name) or ".." in name:
                raise UserError(f"--data: {name!r} is no name of a domain or a language: files are named after it")
        whole, natural = (1, math.inf), (0, math.inf)
        bounds = dict.fromkeys(("score_sentences", "train_sentences", "max_length"), whole)
        bounds |= dict.fromkeys(("dev_sentences", "test_sentences"), natural) | {"max_dropped": (0, 1)}
        check_bounds(self, "data", bounds)

    @property
    def source(self) -> str:
        return self.pair.split("-")[0]

    @property
    def target(self) -> str:
        return self.pair.split("-")[1]

    @property
    def domains(self) -> tuple[str, ...]:
        return (*self.seen, *self.unseen)

    @property
    def groups(self) -> tuple[str, ...]:
        """What statistics are split by: the directions where there are several, else the seen domains."""
        return self.pairs or self.seen

    def name(self, domain: str) -> str:
        """How results, files and uids name a domain of `pair`: `<pair>/<domain>` where a run has several directions."""
        return f"{self.pair}/{domain}" if self.pairs else domain


@dataclass
class ScoreConfig:
    """The scoring pass (CANEFT Eq. 1–3 and 8)."""

    loss: Literal["mean", "sum"] = "mean"
    """Cross-entropy of a sample's target tokens: their mean, or Eq. 2's sum."""
    tokens: Literal["all", "target"] = "all"
    """Average |A·G| over every unpadded position, or over those that predict target tokens only."""
    token_reduce: Literal["mean_abs", "abs_sum"] = "mean_abs"
    """`mean_abs` is Eq. 8; `abs_sum`, |Σ A·G|, is the first-order change of the loss when the channel is silenced."""
    tokens_per_batch: int = 4096
    """Tokens of one packed batch. Samples do not interact: it changes speed and memory, not scores."""
    lowest_octave: int = -40
    """Histogram bins cover scores from 2^lowest_octave, 32 octaves up, 8 bins each."""
    counts: Literal["auto", "device", "host"] = "auto"
    """Where the histogram counts live; `auto` keeps them on the device where 40 % of its free memory holds them."""
    reuse: str = ""
    """A run's folder whose statistics are taken instead, if it scored the same sentences with the same settings."""
    save_minutes: float = 10.0
    """Every so often each rank saves its statistics (2.1 GB for four domains on an 8B), to go on from after a break."""

    def __post_init__(self) -> None:
        check_bounds(self, "score", {"tokens_per_batch": (1, math.inf), "save_minutes": (0, math.inf)})


@dataclass
class TrainConfig:
    """Training of the chosen slices."""

    learning_rate: float = 1e-5
    """The authors' program's."""
    sweep: tuple[float, ...] = ()
    """Train once with each of these learning rates instead, and go on with the lowest dev loss."""
    epochs: int = 2
    max_steps: int = 0
    """Stop after so many optimizer steps; 0 trains all epochs."""
    global_batch_size: int = 5
    """Sentences of one optimizer step over all ranks (the authors' program: 5)."""
    micro_batch_size: int = 0
    """Sentences of one forward on one rank; 0 splits the global batch over the ranks without accumulation."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 0.0
    """Clip the gradient's global norm; 0 does not clip."""
    eval_steps: int = 0
    """Dev loss every so many steps; 0 is once an epoch."""
    save_steps: int = 0
    """A checkpoint every so many steps; 0 is once an epoch."""
    save_total_limit: int = 2
    """Checkpoints kept, the best one apart."""
    load_best: bool = True
    """Export the checkpoint with the lowest dev loss rather than the last."""
    loss_spike: Literal["warn", "stop"] = "warn"
    """What to do when an update's loss jumps far above its running mean: say so, or stop before the next save."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do with an update whose loss or gradient is NaN or infinite on any rank: stop before it, or leave it out,
    so that no weight, moment or step count changes. Its sentences are named; ten in a row stop the run."""
    logging_steps: int = 10
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        for rate in (self.learning_rate, *self.sweep):
            if not 0 < rate < math.inf:
                raise UserError(f"--train.learning-rate {rate}: must be above 0")
        if not (self.adam_beta1 < 1 and self.adam_beta2 < 1):
            raise UserError(f"--train.adam-beta1 {self.adam_beta1}, -beta2 {self.adam_beta2}: must be below 1")
        whole, natural = (1, math.inf), (0, math.inf)
        bounds = dict.fromkeys(("epochs", "global_batch_size", "logging_steps"), whole)
        bounds |= dict.fromkeys(("max_steps", "micro_batch_size", "warmup_steps", "eval_steps", "save_steps"), natural)
        bounds |= dict.fromkeys(("save_total_limit", "weight_decay", "max_grad_norm"), natural)
        bounds |= {"adam_beta1": (0, 1), "adam_beta2": (0, 1), "adam_epsilon": (1e-30, 1)}
        check_bounds(self, "train", bounds)


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: Literal[1, 2, 3] = 1
    """1 partitions optimizer state, 2 gradients too, 3 parameters too (for models that one GPU does not hold)."""


@dataclass
class EvaluateConfig:
    """Decoding and metrics."""

    batch_size: int = 32
    max_new_tokens: int = 256
    base: bool = True
    """Decode the untrained base model too, for comparison."""
    smooth: Literal["exp", "none"] = "exp"
    """sacreBLEU's smoothing of an n-gram order without a match; its signature names it. LANDeRMT prints `none`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the exported model; `auto` is the base checkpoint's own."""
    comet: str = ""
    """COMET too: a model of the hub, or its folder; `default` is Unbabel/wmt22-cometkiwi-da (no references)."""
    comet_python: str = ""
    """Python of COMET's environment (`make comet-env`); empty: $SLICETUNE_COMET_PYTHON, else .venv-comet's."""

    def __post_init__(self) -> None:
        check_bounds(self, "evaluate", dict.fromkeys(("batch_size", "max_new_tokens"), (1, math.inf)))


@dataclass
class ExportConfig:
    """What is written besides the merged model."""

    adapter: Literal["none", "ranks", "one_rank"] = "none"
    """A PEFT adapter that equals the merged model: each layer with a rank of its own, or all with the largest."""


@dataclass
class RunConfig:
    """One run: text → scores → neurons → trained slices → model → BLEU."""

    out: str = "runs/caneft"
    """Everything the run writes lies under this folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    method: AnyMethod = field(default_factory=Caneft)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0
    deterministic: bool = False
    """Ask torch and flash-attn for deterministic kernels (slower on a GPU; a CPU run is deterministic anyway)."""
    dry_run: bool = False
    """Print settings, parameters, memory and steps; read no weights, use no network, write nothing."""
    gpus: int = 0
    """For --dry-run: how many GPUs to count with; 0 is torchrun's number of ranks, else 8."""
    gpu_memory: float = 0.0
    """For --dry-run: GB (10⁹ bytes) of one GPU, to say what fits; 0 asks the GPU that is here."""
    resume: str = "auto"
    """`auto` goes on from the newest valid checkpoint in --out; a checkpoint folder goes on from that one."""
    shape: str = ""
    """Name of the model's shape in slicetune.engine.shapes, for --dry-run without its config.json; recipes set it."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")
        if (self.gpus or self.gpu_memory) and not self.dry_run:
            raise UserError("--gpus and --gpu-memory are what --dry-run counts with; a run takes torchrun's ranks")
        if self.model.compile == "blocks" and self.zero.stage == 3:
            raise UserError(
                "--model.compile blocks: ZeRO stage 3 gathers weights within blocks: use --zero.stage 1 or 2"
            )
        if self.model.compile == "blocks" and getattr(self.method, "magnitude", False):
            raise UserError(f"--model.compile blocks: PEFT's {self.method.title} cannot be traced: leave it at off")
        if self.export.adapter != "none" and not (self.method.selects or isinstance(self.method, Lora)):
            raise UserError(f"--export.adapter: what {self.method.kind} trains is no LoRA; leave it at none")

    @property
    def train_sentences(self) -> int:
        """Sentences a seen domain that this run's method trains on, by --data.budget."""
        few = self.method.selects or self.data.budget == "equal"
        return self.data.train_sentences if few else self.data.score_sentences
