"""TRL's SFTTrainer on a model with attached neurons: what it saves and resumes is the live model."""

from __future__ import annotations

import loops
from datasets import Dataset
from shared import WORK, finish, truth
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

FOLDER = WORK / "trl"
KINDS = {"slices": "SparseColumnAdamW", "torch": "torch.optim.AdamW"}


def trained(kind: str, name: str, resume: str | None = None, **own: object) -> SFTTrainer:
    """Twelve updates of eight sentences, of which completions alone are learned."""
    model, params = loops.attached()
    settings = loops.settings(
        output_dir=str(FOLDER / name), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        bf16=False, gradient_checkpointing=False, max_length=256,
    ) | own  # fmt: skip
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(truth()["texts"]),
        processing_class=AutoTokenizer.from_pretrained(truth()["base"]),
        optimizers=(loops.optimizer(kind, params), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saves(kind: str, what: str, **own: object) -> None:
    """save_model right after the last step, then ffn.save."""
    name = f"{kind}-{what.split()[0]}"
    trainer = trained(kind, name, **own)
    trainer.save_model(str(FOLDER / name / "saved"))
    loops.save(trainer.model, FOLDER / name / "ours")
    live = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast, as loaded
    loops.saved(f"{KINDS[kind]}, {what}: trainer.save_model", live, FOLDER / name / "saved")
    loops.saved(f"{KINDS[kind]}, {what}: ffn.save", live, FOLDER / name / "ours")


def resumes(kind: str) -> None:
    """From the checkpoint in the middle of a run, against that run."""
    whole = trained(kind, f"{kind}-resume", save_strategy="steps", save_steps=6)
    again = trained(kind, f"{kind}-resumed", resume=str(FOLDER / f"{kind}-resume" / "checkpoint-6"))
    loops.same_row(
        f"{KINDS[kind]}: resumed from checkpoint-6", loops.state_of(again.model), loops.state_of(whole.model)
    )


if __name__ == "__main__":
    for kind in KINDS:
        saves(kind, "plain")
        saves(kind, "gradient checkpointing and bf16", gradient_checkpointing=True, bf16=True)
        resumes(kind)
    finish("trl", "transformers", "torch")
