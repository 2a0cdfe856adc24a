"""Hugging Face's Trainer in a loop of somebody's own: what it saves, resumes and chooses is the live model."""

from __future__ import annotations

import loops
from shared import WORK, finish, row
from transformers import Trainer, TrainingArguments

FOLDER = WORK / "trainer"
KINDS = {"slices": "SparseColumnAdamW", "torch": "torch.optim.AdamW", "": "the Trainer's own AdamW"}


def trained(kind: str, name: str, resume: str | None = None, dtype: str = "float32", **own: object) -> Trainer:
    """Twelve updates of eight sentences; `kind` names the optimizer."""
    model, params = loops.attached(getattr(loops.torch, dtype))
    settings = loops.settings(
        output_dir=str(FOLDER / name), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, per_device_eval_batch_size=8,
    ) | own  # fmt: skip
    made = (loops.optimizer(kind, params), None) if kind else (None, None)
    trainer = Trainer(
        model, TrainingArguments(**settings), loops.collate, loops.Sentences(), loops.Sentences(16), optimizers=made
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saves(kind: str, what: str, **own: object) -> None:
    """save_model right after the last step, then ffn.save."""
    name = f"{kind or 'own'}-{what.split()[0]}"
    trainer = trained(kind, name, **own)
    trainer.save_model(str(FOLDER / name / "saved"))
    ours = FOLDER / name / "ours"
    loops.save(trainer.model, ours)
    live = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast, as loaded
    loops.saved(f"{KINDS[kind]}, {what}: trainer.save_model", live, FOLDER / name / "saved")
    loops.saved(f"{KINDS[kind]}, {what}: ffn.save", live, ours)


def resumes(kind: str) -> None:
    """From the checkpoint in the middle of a run, against that run."""
    every = {"save_strategy": "steps", "save_steps": 6}
    whole = trained(kind, f"{kind}-resume", **every)
    middle = FOLDER / f"{kind}-resume" / "checkpoint-6"
    again = trained(kind, f"{kind}-resumed", resume=str(middle))
    what = f"{KINDS[kind]}: resumed from checkpoint-6"
    loops.same_row(what, loops.state_of(again.model), loops.state_of(whole.model))
    loops.saved(f"{KINDS[kind]}: checkpoint-12 of that run", whole.model, FOLDER / f"{kind}-resume" / "checkpoint-12")


def checkpointing(kind: str) -> None:
    """Gradient checkpointing trains the same weights."""
    usual = trained(kind, f"{kind}-usual")
    less = trained(kind, f"{kind}-checkpointing", gradient_checkpointing=True)
    loops.same_row(
        f"{KINDS[kind]}: gradient checkpointing against none", loops.state_of(less.model), loops.state_of(usual.model)
    )


def best(kind: str) -> None:
    """load_best_model_at_end. The highest loss counts as the best: so an early checkpoint is taken, not the last."""
    name = f"{kind}-best"
    every = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = trained(kind, name, load_best_model_at_end=True, greater_is_better=True, **every)
    trainer.save_model(str(FOLDER / name / "saved"))
    chosen, least = trainer.state.best_global_step, trainer.state.best_metric
    loss = trainer.evaluate()["eval_loss"]
    found = f"step {chosen} of 12, loss {least:.6f}, evaluated again {loss:.6f}"
    row(f"{KINDS[kind]}: load_best_model_at_end", found, loss == least and chosen < 12)
    loops.saved(f"{KINDS[kind]}, best: trainer.save_model", trainer.model, FOLDER / name / "saved")


def main() -> None:
    for kind in KINDS:
        saves(kind, "accumulation of 2")
    for kind in ("slices", "torch"):
        saves(kind, "bf16 of autocast", bf16=True)
        saves(kind, "bfloat16 weights", dtype="bfloat16")
        saves(kind, "gradient checkpointing", gradient_checkpointing=True)
        checkpointing(kind)
        resumes(kind)
        best(kind)
    finish("transformers", "accelerate", "torch")


if __name__ == "__main__":
    main()
