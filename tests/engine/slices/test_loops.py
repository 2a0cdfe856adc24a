"""Slices in somebody else's loop train to the engine's weights: DDP, FSDP2, Accelerate, Hugging Face's Trainer.

Every loop sees the same update: all eight sentences at once, so the order of sentences plays no part.
"""

from __future__ import annotations

import pytest
import torch
import toys

from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.optim import SparseColumnAdamW

SENTENCES, STEPS = 8, 5
SETTINGS = {
    "data_train_sentences": SENTENCES,
    "train_global_batch_size": SENTENCES,
    "train_epochs": STEPS,
    "train_weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def engine(pool, tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("engine")
    state = pool.run("train_slices", str(out), SETTINGS)[0]
    return {name.removeprefix("master/"): t for name, t in state.items() if name.startswith("master/")}


def sliced_model():
    model = toys.model()
    params = attach(model, toys.neurons())
    return model, SparseColumnAdamW(params, lr=1e-2, weight_decay=0.1)


def slices(model) -> dict[str, torch.Tensor]:
    return {f"{name.removesuffix('.weight')}.rows": p.detach() for name, _, p, _ in toys.named_slices(model)}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


class Sentences(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.examples = toys.examples(SENTENCES)

    def __len__(self) -> int:
        return SENTENCES

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        e = self.examples[i]
        labels = [-100] * e.target_start + e.input_ids[e.target_start :]
        return {"input_ids": e.input_ids, "labels": labels}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(r["input_ids"]) for r in rows)
    pad = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([r[k] + [pad[k]] * (width - len(r[k])) for r in rows]) for k in pad}
    batch["attention_mask"] = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    )
    return batch


def test_hugging_face_trainer(engine, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, optimizer = sliced_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=SENTENCES,
        num_train_epochs=STEPS,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(model, arguments, collate, Sentences(), optimizers=(optimizer, constant))
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert_same(slices(model), engine)


def test_accelerate(engine):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = sliced_model()
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=SENTENCES, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(STEPS):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(slices(accelerator.unwrap_model(model)), engine)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_data_parallel_wrappers(pool, engine, wrapper):
    for rank in pool.run("train_wrapped", wrapper, SENTENCES, STEPS):
        assert_same(rank, engine)
