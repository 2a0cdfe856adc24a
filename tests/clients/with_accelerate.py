"""Accelerate: save_model, get_state_dict and save_state of a model with attached neurons."""

from __future__ import annotations

import shutil
from pathlib import Path

import loops
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from shared import WORK, finish, row, truth
from torch import Tensor, nn

FOLDER = WORK / "accelerate"
KINDS = {"slices": "SparseColumnAdamW", "torch": "torch.optim.AdamW"}


class Loop:
    """A model, its optimizer and the accelerator that has them."""

    def __init__(self, kind: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        set_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, self.params = loops.attached()
        self.model, self.optimizer = self.accelerator.prepare(model, loops.optimizer(kind, self.params))

    def train(self, first: int, last: int) -> None:
        """The batches first … last - 1, an update every two."""
        for step in range(first, last):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**loops.batch(step)).loss)
                self.optimizer.step()
                self.optimizer.zero_grad()


def saves(kind: str) -> None:
    """save_model, the documented save_pretrained, and get_state_dict: each after a step that no forward follows."""
    loop = Loop(kind)
    loop.train(0, 12)
    folder = FOLDER / kind
    loop.accelerator.save_model(loop.model, folder / "save_model")
    with_config(folder / "save_model")
    held = {name: value.clone() for name, value in loop.accelerator.get_state_dict(loop.model).items()}
    plain = loop.accelerator.unwrap_model(loop.model)
    plain.save_pretrained(folder / "save_pretrained", state_dict=loop.accelerator.get_state_dict(loop.model))
    loops.save(loop.model, folder / "ours")
    for name in ("save_model", "save_pretrained"):
        loops.saved(f"{KINDS[kind]}: {name}", plain, folder / name)
    loops.saved(f"{KINDS[kind]}: ffn.save of the prepared model", plain, folder / "ours")
    taken(f"{KINDS[kind]}: get_state_dict in a plain model", plain, held)


def taken(what: str, live: nn.Module, held: dict[str, Tensor]) -> None:
    """A state dict in a plain model of transformers."""
    other = loops.plain(truth()["base"])
    unknown = other.load_state_dict(held, strict=False).unexpected_keys
    loops.compared(what, loops.logits(live), other, f"; {len(unknown)} unknown keys")


def with_config(folder: Path) -> None:
    """save_model writes weights alone."""
    shutil.copy(Path(truth()["base"]) / "config.json", folder)


def resumes(kind: str) -> None:
    """save_state in the middle, load_state in a new model, against the unbroken loop."""
    whole, again = Loop(kind), None
    whole.train(0, 6)
    whole.accelerator.save_state(str(FOLDER / kind / "state"))
    whole.train(6, 12)
    unbroken = loops.state(whole.params)
    again = Loop(kind)
    again.accelerator.load_state(str(FOLDER / kind / "state"))
    again.train(6, 12)
    loops.same_row(f"{KINDS[kind]}: save_state, load_state, the rest", loops.state(again.params), unbroken)
    files = sorted(path.name for path in (FOLDER / kind / "state").iterdir())
    row(f"{KINDS[kind]}: files of save_state", " ".join(files), "model.safetensors" in files)


if __name__ == "__main__":
    for kind in KINDS:
        saves(kind)
        resumes(kind)
    finish("accelerate", "transformers", "torch")
