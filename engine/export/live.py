"""The trained model twice: as it was trained, and as a user loads its export. Their logits must be the same.

Live is the base with the method's parts in place and the chosen checkpoint's values in them, as a resumed run has it;
the other is what `from_pretrained` makes of model/. The trained values are rounded to the export's dtype first, and
both run in float32 where that fits, so that hardly a rounding is left. Next: audit.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import checkpoint
from ..common.checkpoint import MASTER
from ..common.errors import UserError
from ..common.shards import open_shard, tensor_files
from ..methods.landermt.routing import router_of
from ..methods.method import Method
from ..models.config import ModelConfig
from ..models.load import load_model
from ..slices.patches import load_masters
from .routed import load_routed

CHOSEN = "chosen.json"
"""The checkpoint of a run that was exported, its learning rate, dev losses by rate, counts."""
LIMIT, ROUNDED = 1e-3, 0.05
"""Largest relative deviation of the logits: in float32 of the same weights; and where half precision rounds sums, or
whole weights into which low-rank matrices were merged."""
ROWS, WIDTH = 2, 24


@dataclass(frozen=True)
class Likeness:
    """How far the export's logits are from the live model's; `why_not` where they could not be compared."""

    deviation: float = 0.0
    """‖export − live‖ / ‖live‖."""
    limit: float = 0.0
    why_not: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.why_not) or self.deviation <= self.limit

    def __str__(self) -> str:
        if self.why_not:
            return f"logits: not compared with the trained model, {self.why_not}"
        verdict = "as loaded by from_pretrained" if self.ok else "NOT THE TRAINED MODEL'S"
        return f"logits: within {self.deviation:.1e} of the trained model's (limit {self.limit:.0e}), {verdict}"


def chosen_masters(run: Path) -> dict[str, Tensor]:
    """Tensors of the checkpoint that a run has exported: `master/<name>`, fp32."""
    try:
        folder = run / json.loads((run / CHOSEN).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{run / CHOSEN}: not what training leaves: delete it, and training goes on from its checkpoints"
        ) from None
    return checkpoint.load(folder)[0]


def compare(base: Path, run: Path, method: Method) -> Likeness:
    """The logits of both on a few rows of tokens. One model is in memory at a time."""
    exported = run / "model"
    stored, weights = _stored(exported)
    dtype = next((one for one in (torch.float32, stored) if _fits(weights * one.itemsize)), None)
    if dtype is None:
        return Likeness(why_not=f"its {weights * stored.itemsize / 1e9:.0f} GB do not fit in this machine's memory")
    try:
        tensors = chosen_masters(run)
    except (OSError, UserError):
        return Likeness(why_not="whose checkpoint is not there any more")
    exact = dtype in (torch.float32, torch.float64) and (stored == dtype or not method.low_rank)
    limit = LIMIT if exact else ROUNDED
    if not method.low_rank:
        tensors = {name: t.to(stored) if name.startswith(MASTER) else t for name, t in tensors.items()}
    want = _logits(_live(base, run, method, tensors, dtype))
    got = _logits(_as_a_user(exported, method, dtype))
    if got.shape != want.shape:
        return Likeness(float("inf"), limit)
    return Likeness(float((got - want).norm() / want.norm()), limit)


def _fits(size: int) -> bool:
    """Whether a model of so many bytes fits where it would run."""
    if torch.cuda.is_available():
        return 1.2 * size < torch.cuda.mem_get_info()[0]
    return 1.3 * size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _live(base: Path, run: Path, method: Method, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model, chosen = load_model(str(base), ModelConfig(), _device(), dtype), method.load_chosen(run)
    method.prepare(model, chosen, groups=chosen.pairs if method.routed else ())
    load_masters(model, tensors)
    return _told(model)


def _as_a_user(exported: Path, method: Method, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if method.routed:
        return _told(load_routed(exported, ModelConfig(), _device()).to(dtype))
    return AutoModelForCausalLM.from_pretrained(exported, dtype=dtype).to(_device())


def _told(model: nn.Module) -> nn.Module:
    """A routed model needs to know the language pairs of its rows."""
    router = router_of(model)
    if router is not None:
        router.set([router.pairs[0]] * ROWS)
    return model


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Logits [ROWS, WIDTH, V] in fp32 on the CPU, of tokens that are drawn from the whole vocabulary."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (ROWS, WIDTH), generator=draw)
    return model.eval()(input_ids=ids.to(_device()), use_cache=False).logits.float().cpu()


def _stored(folder: Path) -> tuple[torch.dtype, int]:
    """The dtype of most of a model's weights, and how many weights there are."""
    counts: dict[torch.dtype, int] = {}
    for file in sorted(set(tensor_files(folder).values())):
        with open_shard(folder / file) as shard:
            for entry in shard.entries.values():
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.count
    return max(counts, key=counts.__getitem__), sum(counts.values())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
