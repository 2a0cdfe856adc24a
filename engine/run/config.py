"""A run as one tree of dataclasses: what the command line sets and `config.json` stores.

    torchrun --nproc_per_node 8 recipes/caneft_llama31.py --data.dir DATA --out runs/caneft-de-en

Field names follow Hugging Face's TrainingArguments where it has one. Each field is followed by its documentation,
which is also its help on the command line (tyro). common/settings.py turns the tree into JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.settings import COMMAND, RETIRED, matters, tuples
from ..data.config import DataConfig
from ..evaluation.config import EvaluateConfig
from ..export.config import ExportConfig
from ..methods.caneft.settings import Caneft
from ..methods.kinds import METHODS, AnyMethod
from ..models.config import ModelConfig
from ..scoring.config import ScoreConfig
from ..training.config import TrainConfig, ZeroConfig


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
    """Of all that is drawn: the sentences, their order, new weights."""
    deterministic: bool = False
    """Ask torch and flash-attn for deterministic kernels (slower on a GPU; a CPU run is deterministic anyway)."""
    dry_run: bool = matters(COMMAND, False)
    """Print settings, parameters, memory and steps; read no weights, use no network, write nothing."""
    gpus: int = matters(COMMAND, 0)
    """For --dry-run: how many GPUs to count with; 0 is torchrun's number of ranks, else 8."""
    gpu_memory: float = matters(COMMAND, 0.0)
    """For --dry-run: GB (10⁹ bytes) of one GPU, to say what fits; 0 asks the GPU that is here."""
    resume: str = "auto"
    """`auto` goes on from the newest valid checkpoint in --out; a checkpoint folder goes on from that one."""
    shape: str = matters(COMMAND, "")
    """For --dry-run without the model's config.json: the name of a known shape (models/shapes.py); recipes set it."""

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
        if self.model.compile == "blocks" and self.model.partition == "on":
            raise UserError(
                "--model.compile blocks: a partitioned model's weights are gathered within blocks: use "
                "--model.partition off"
            )
        if self.model.compile == "blocks" and not self.method.compiles:
            raise UserError(f"--model.compile blocks: PEFT's {self.method.title} cannot be traced: leave it at off")
        if self.score.tokens != "all" and self.method.reads_all_tokens:
            raise UserError(
                f"--score.tokens {self.score.tokens}: {self.method.title} reads all tokens of a sentence: write all"
            )
        if self.export.adapter != "none" and not self.method.adapts:
            raise UserError(f"--export.adapter: what {self.method.kind} trains is no LoRA; leave it at none")
        if self.quantised:
            self._check_quantised()
        elif self.evaluate.on == "quantised":
            raise UserError(
                "--evaluate.on quantised: the base is not quantised: set --model.quantize too, or leave this out"
            )

    def _check_quantised(self) -> None:
        """Raises UserError for what cannot be done with weights that are numbers of a quantisation."""
        kind = f"--model.quantize {self.model.quantize}"
        if self.method.trains_whole_weights:
            how = " with --method.attention" if self.method.routed else ""
            what = f"{self.method.title}{how} trains whole weights of the base, which cannot be trained in 4 or 8 bits"
            raise UserError(f"{kind}: {what}: leave --model.quantize out, or train slices, LoRA or DoRA")
        if self.method.reads_weights and self.model.quantize == "fp8":
            raise UserError(f"{kind}: {self.method.title} reads the weights themselves: use nf4 or int8")
        if self.model.partition == "on" or self.zero.stage == 3:
            flag = "--model.partition on" if self.model.partition == "on" else "--zero.stage 3"
            raise UserError(f"{kind}: quantised weights are not cut up among ranks: leave out {flag}")
        if self.model.compile == "blocks":
            raise UserError(f"{kind}: quantised blocks are not compiled: leave --model.compile at off")

    @property
    def quantised(self) -> bool:
        """Whether the base is held in 4 or 8 bits while it is scored and trained."""
        return self.model.quantize != "none"

    @property
    def measured_on(self) -> str:
        """The weights that decode: `nf4`, `int8` or `fp8` with full-precision slices, or `full`."""
        return self.model.quantize if self.quantised and self.evaluate.on != "full" else "full"

    def check_groups(self) -> None:
        """Raises UserError where the method compares more groups than there are: to be called before any scoring."""
        if len(self.data.groups) < self.method.least_groups:
            raise UserError(
                f"--data.seen {' '.join(self.data.groups)}: {self.method.title} compares domains, and this is one: "
                "name two or more, or several directions in --data.pairs"
            )

    @property
    def train_sentences(self) -> int:
        """Sentences a seen domain that this run's method trains on, by --data.budget."""
        few = self.method.selects or self.data.budget == "equal"
        return self.data.train_sentences if few else self.data.score_sentences


def read_run(run: str | os.PathLike[str]) -> RunConfig:
    """The settings in `RUN/config.json`; what an older version did not store has its default.

    Raises UserError naming the file if it is missing or no run's.
    """
    path = Path(run) / "config.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        method = dict(plain.pop("method"))
        parts: dict[str, Any] = {"method": METHODS[method.pop("kind")](**tuples(method))}
        default = RunConfig()
        for name, value in plain.items():
            if whole := isinstance(value, dict):
                value = {key: entry for key, entry in value.items() if key not in RETIRED}
            parts[name] = dataclasses.replace(getattr(default, name), **tuples(value)) if whole else value
        return RunConfig(**parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the settings of a run ({error}): name a run's --out") from None
