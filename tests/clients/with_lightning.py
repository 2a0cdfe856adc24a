"""Lightning: ModelCheckpoint, save_checkpoint, load_from_checkpoint and resuming, with attached neurons."""

from __future__ import annotations

from pathlib import Path

import lightning
import loops
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from shared import WORK, finish, truth
from torch import Tensor

FOLDER = WORK / "lightning"
KINDS = {"slices": "SparseColumnAdamW", "torch": "torch.optim.AdamW"}


class Tuned(lightning.LightningModule):
    """The base with the run's neurons."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, self.params = loops.attached()

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return loops.optimizer(self.hparams.kind, self.params)


def fitted(kind: str, name: str, resume: Path | None = None) -> tuple[lightning.Trainer, Tuned]:
    """Twelve updates, with a checkpoint every six."""
    lightning.seed_everything(0, verbose=False)
    kept = ModelCheckpoint(FOLDER / name, "{step}", every_n_train_steps=6, save_top_k=-1, enable_version_counter=False)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=12, max_epochs=-1, accumulate_grad_batches=2, callbacks=[kept], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Tuned(kind)
    trainer.fit(module, torch.utils.data.DataLoader(loops.Sentences(48), 4, collate_fn=loops.collate), ckpt_path=resume)
    return trainer, module


def main(kind: str) -> None:
    """What each checkpoint holds, against the live module."""
    said = KINDS[kind]
    trainer, module = fitted(kind, kind)
    trainer.save_checkpoint(FOLDER / kind / "own.ckpt")
    loops.save(module.model, FOLDER / kind / "ours")
    for name, file in (("ModelCheckpoint", "step=12.ckpt"), ("save_checkpoint", "own.ckpt")):
        held = torch.load(FOLDER / kind / file, weights_only=True)["state_dict"]
        taken(f"{said}, {name}: its state_dict in a plain model", module, held)
        again = Tuned.load_from_checkpoint(FOLDER / kind / file, map_location="cpu", weights_only=True)
        loops.compared(f"{said}, {name}: load_from_checkpoint", loops.logits(module.model), again.model)
    loops.saved(f"{said}: ffn.save", module.model, FOLDER / kind / "ours")
    _, resumed = fitted(kind, f"{kind}-resumed", FOLDER / kind / "step=6.ckpt")
    loops.same_row(f"{said}: resumed from step=6.ckpt", loops.state(resumed.params), loops.state(module.params))


def taken(what: str, module: Tuned, held: dict[str, Tensor]) -> None:
    """A checkpoint's weights in a plain model of transformers."""
    other = loops.plain(truth()["base"])
    unknown = other.load_state_dict({name.removeprefix("model."): v for name, v in held.items()}, strict=False)
    note = f"; {len(unknown.unexpected_keys)} unknown keys, {len(unknown.missing_keys)} missing"
    loops.compared(what, loops.logits(module.model), other, note)


if __name__ == "__main__":
    for kind in KINDS:
        main(kind)
    finish("lightning", "transformers", "torch")
