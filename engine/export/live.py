"""The trained model twice: as it was trained, and as a user loads its export. They must be the same.

What the checkpoint that was chosen has for a tensor must stand in the export, bit for bit after the rounding to its
dtype. And their logits must be equal: live is the base with the method's parts in place and that checkpoint's values in
them, as a resumed run has it, rounded where the export is; the other is what `from_pretrained` makes of model/. Both
compute in float32, so that what is left is the order of sums. Where a model is large beside the machine's memory both
are read from the disk while they compute: live a block at a time (streamed.py), the other as transformers and
accelerate do it. Next: audit.py.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import checkpoint, private
from ..common.checkpoint import MASTER
from ..common.errors import UserError
from ..common.files import first_line
from ..common.shards import open_shard, tensor_files
from ..methods.landermt.routing import route, router_of
from ..methods.method import Method
from ..models.config import ModelConfig
from ..models.load import load_model
from ..slices.patches import load_masters
from .model import by_key
from .routed import load_routed, routes_in
from .streamed import hollow

CHOSEN = "chosen.json"
"""The checkpoint of a run that was exported, its learning rate, dev losses by rate, counts."""
LIMIT, ROUNDED = 1e-4, 0.05
"""Largest relative deviation of the logits: in float32 of the same weights; and where half precision rounds sums, or
whole weights into which low-rank matrices were merged."""
ROWS, WIDTH = 2, 24
WHOLE = 0.25
"""The share of this machine's memory that a model in float32 may take; a larger one is read while it computes."""


@dataclass(frozen=True)
class Likeness:
    """How far the export's logits are from the live model's; `why_not` where they could not be compared."""

    deviation: float = 0.0
    """‖export − live‖ / ‖live‖."""
    limit: float = 0.0
    why_not: str = ""
    streamed: bool = False
    """Whether both were read from the disk while they computed."""

    @property
    def ok(self) -> bool:
        return bool(self.why_not) or self.deviation <= self.limit

    def __str__(self) -> str:
        if self.why_not:
            return f"logits: not compared with the trained model, {self.why_not}"
        verdict = "as loaded by from_pretrained" if self.ok else "NOT THE TRAINED MODEL'S"
        verdict += ", both read from the disk block by block" if self.streamed else ""
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
    """The logits of both on a few rows of tokens. One model is in memory at a time, or one block of it."""
    stored, count = _stored(run / "model")
    dtype = torch.promote_types(stored, torch.float32)
    place = _room(count * dtype.itemsize)
    try:
        tensors = chosen_masters(run)
    except UserError as error:
        gone = not any((run / "checkpoints").glob("step-*")) and not any(run.glob("sweep/*/checkpoints/step-*"))
        why = "is not there any more" if gone else f"cannot be read: {error}"
        return Likeness(why_not=f"whose checkpoint {why}")
    limit = ROUNDED if stored != dtype and method.low_rank else LIMIT
    try:
        want, how = _live_logits(base, run, method, tensors, (stored, dtype), place)
        got = _exported_logits(run / "model", method, dtype, place, how)
    except (RuntimeError, ValueError) as error:  # a layer that reads another's weights; an old accelerate
        if place or isinstance(error, UserError):
            raise
        return Likeness(why_not=f"whose weights cannot be read block by block ({first_line(error)})")
    if not place and not bool(torch.isfinite(want).all()):
        return Likeness(why_not="whose blocks compute with weights of others, so they cannot be read one by one")
    if got.shape != want.shape:
        return Likeness(float("inf"), limit, streamed=not place)
    return Likeness(float((got - want).norm() / want.norm()), limit, streamed=not place)


def _live_logits(
    base: Path, run: Path, method: Method, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...], place: str
) -> tuple[Tensor, str]:
    """And the attention that they were made with."""
    if place:
        model = _live(base, run, method, tensors, dtypes, place)
    else:
        model = _streamed_live(base, run, method, tensors, dtypes)
    return _logits(model), private.attention_of(model)


def _live(
    base: Path, run: Path, method: Method, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...], place: str
) -> nn.Module:
    """It computes in the second dtype, of values that are rounded to the first where the export holds them as such."""
    (stored, dtype), chosen = dtypes, method.load_chosen(run)
    model = load_model(str(base), ModelConfig(), torch.device(place), stored).to(dtype)
    method.prepare(model, chosen, groups=chosen.pairs if method.routed else ())
    load_masters(
        model, {n: t.to(stored) if _held(n, method) else t for n, t in tensors.items() if n.startswith(MASTER)}
    )
    return _told(model)


def _held(name: str, method: Method) -> bool:
    """Whether a trained value is a weight of its own in the export: not LoRA's, nor shares."""
    return ".shares." not in name and not method.low_rank


def _streamed_live(
    base: Path, run: Path, method: Method, tensors: dict[str, Tensor], dtypes: tuple[torch.dtype, ...]
) -> nn.Module:
    """As `_live`, the method's parts attached too, with the weights of one block in memory."""
    (stored, dtype), chosen = dtypes, method.load_chosen(run)
    found = hollow(base, dtype)
    method.prepare(found.model, chosen, groups=chosen.pairs if method.routed else ())
    trained = lambda name: tensors[MASTER + name].to(stored if _held(name, method) else torch.float32)  # noqa: E731
    found.stream(trained, stored)
    return _told(found.model)


def _exported_logits(exported: Path, method: Method, dtype: torch.dtype, place: str, how: str) -> Tensor:
    """Where there is no `place` it computes from the disk.

    `how` is the attention: transformers 5.17 gives Gemma-2 one that leaves out its cap.
    """
    from transformers import AutoModelForCausalLM

    if method.routed and place:
        config = ModelConfig(dtype=str(dtype).removeprefix("torch."))
        return _logits(_told(load_routed(exported, config, torch.device(place))))
    if method.routed:
        found = hollow(exported, dtype)
        route(found.model, routes_in(exported))
        found.stream({}.__getitem__)
        return _logits(_told(found.model))
    if place:
        return _logits(AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, attn_implementation=how).to(place))
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that weights are on the disk is meant
    with tempfile.TemporaryDirectory() as unused:  # the shards are read where they are
        where = {"device_map": {"": "disk"}, "offload_folder": unused}
        return _logits(AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, attn_implementation=how, **where))


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
    place = next(model.parameters()).device
    ids = ids if place.type == "meta" else ids.to(place)  # accelerate's weights that are on the disk
    return model.eval()(input_ids=ids, use_cache=False).logits.float().cpu()


def _stored(folder: Path) -> tuple[torch.dtype, int]:
    """The dtype of most of a model's weights, and how many it has."""
    sizes: dict[torch.dtype, int] = {}
    for file in sorted(set(tensor_files(folder).values())):
        with open_shard(folder / file) as shard:
            for entry in shard.entries.values():
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.count
    return max(sizes, key=sizes.__getitem__), sum(sizes.values())


def _room(size: int) -> str:
    """Where a model of so many bytes is held whole: `cuda` or `cpu`; empty where it is not."""
    if torch.cuda.is_available() and 1.3 * size < torch.cuda.mem_get_info()[0]:
        return "cuda"
    return "cpu" if size <= WHOLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") else ""
