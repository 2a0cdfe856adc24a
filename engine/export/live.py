"""The trained model twice: as it was trained, and as a user loads its export. They must be the same.

What the checkpoint that was chosen has for a tensor must stand in the export, bit for bit after the rounding to its
dtype. And their logits must be equal: live is the base with the method's parts in place and that checkpoint's values in
them, as a resumed run has it, rounded where the export is; the other is what `from_pretrained` makes of model/. Both
compute in float32, so that what is left is the order of sums. Next: audit.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import checkpoint, private
from ..common.checkpoint import MASTER
from ..common.errors import UserError
from ..common.shards import open_shard, tensor_files
from ..methods.landermt.routing import router_of
from ..methods.method import Method
from ..models.config import ModelConfig
from ..models.load import load_model
from ..slices.patches import load_masters
from .model import by_key
from .routed import load_routed

CHOSEN = "chosen.json"
"""The checkpoint of a run that was exported, its learning rate, dev losses by rate, counts."""
LIMIT, ROUNDED = 1e-4, 0.05
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


def not_as_trained(base: Path, run: Path, method: Method, places: Iterable[str]) -> list[str]:
    """Tensors of the export that are not the chosen checkpoint's; none where that is not there any more.

    `places` are the export's keys. What is made of the base's values (a merged LoRA) is left to the logits.
    """
    try:
        tensors = chosen_masters(run)
    except UserError:
        return []
    files, found = tensor_files(run / "model"), []
    patches = {
        n: p for n, p in method.patches(base, method.load_chosen(run), tensors).items() if not callable(p.values)
    }
    for key, patch in by_key(base, patches, dict.fromkeys(places, "")).items():
        if key in files:
            with open_shard(run / "model" / files[key]) as shard:
                stored = shard.read(key)
            part = stored if patch.axis is None else stored.index_select(int(patch.axis == "column"), patch.index.cpu())
            part = part.t() if patch.axis == "column" else part
            if not torch.equal(part, patch.values.to(part)):
                found.append(key)
    return found


def compare(base: Path, run: Path, method: Method) -> Likeness:
    """The logits of both on a few rows of tokens. One model is in memory at a time."""
    exported = run / "model"
    stored, count = _stored(exported)
    wide = torch.promote_types(stored, torch.float32)
    dtype, place = _room(count, wide, stored)
    if dtype is None:
        return Likeness(why_not=f"its {count * stored.itemsize / 1e9:.0f} GB do not fit in this machine's memory")
    try:
        tensors = chosen_masters(run)
    except UserError as error:
        gone = not any((run / "checkpoints").glob("step-*")) and not any(run.glob("sweep/*/checkpoints/step-*"))
        why = "is not there any more" if gone else f"cannot be read: {error}"
        return Likeness(why_not=f"whose checkpoint {why}")
    limit = LIMIT if dtype == wide and (stored == wide or not method.low_rank) else ROUNDED
    live = _live(base, run, method, tensors, (stored, dtype), place)
    want, how = _logits(live), private.attention_of(live)
    del live
    got = _logits(_as_a_user(exported, method, dtype, place, how))
    if got.shape != want.shape:
        return Likeness(float("inf"), limit)
    return Likeness(float((got - want).norm() / want.norm()), limit)


def _live(
    base: Path, run: Path, method: Method, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...], place: str
) -> nn.Module:
    """It computes in the second dtype, of values that are rounded to the first where the export holds them as such."""
    (stored, dtype), chosen = dtypes, method.load_chosen(run)
    model = load_model(str(base), ModelConfig(), torch.device(place), stored).to(dtype)
    method.prepare(model, chosen, groups=chosen.pairs if method.routed else ())
    held = {n for n in tensors if n.startswith(MASTER) and ".shares." not in n and not method.low_rank}
    load_masters(model, {name: t.to(stored) if name in held else t for name, t in tensors.items()})
    return _told(model)


def _as_a_user(exported: Path, method: Method, dtype: torch.dtype, place: str, how: str) -> nn.Module:
    """`how` is the attention: transformers 5.17 gives Gemma-2 one that leaves out its cap."""
    from transformers import AutoModelForCausalLM

    if method.routed:
        return _told(load_routed(exported, ModelConfig(dtype=str(dtype).removeprefix("torch.")), torch.device(place)))
    return AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, attn_implementation=how).to(place)


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
    return model.eval()(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def _stored(folder: Path) -> tuple[torch.dtype, int]:
    """The dtype of most of a model's weights, and how many it has."""
    sizes: dict[torch.dtype, int] = {}
    for file in sorted(set(tensor_files(folder).values())):
        with open_shard(folder / file) as shard:
            for entry in shard.entries.values():
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.count
    return max(sizes, key=sizes.__getitem__), sum(sizes.values())


def _room(count: int, *dtypes: torch.dtype) -> tuple[torch.dtype | None, str]:
    """The first dtype in which so many weights fit somewhere, and the device; None where none does."""
    memory = {"cpu": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    if torch.cuda.is_available():
        memory = {"cuda": torch.cuda.mem_get_info()[0]} | memory
    fits = ((dtype, place) for dtype in dtypes for place in memory if 1.3 * count * dtype.itemsize < memory[place])
    return next(fits, (None, ""))
