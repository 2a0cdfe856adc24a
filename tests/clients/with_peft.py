"""PEFT on the exported adapters: load, merge, weigh two, save and load again, train on."""

from __future__ import annotations

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from shared import WORK, finish, row, truth, zero_row
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ADAPTERS = {
    "a CANEFT run's adapter/, ranks": ("run/adapter", "run"),
    "the same, one_rank": ("one_rank", "run"),
    "a second CANEFT run's, one_rank": ("second/adapter", "second"),
    "a LoRA run's": ("lora/adapter", "lora"),
}
SYSTEMS = dict(ADAPTERS.values())


def plain(system: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(truth()["models"][system], dtype=torch.float32).eval()


def adapted(place: str, **settings: object) -> nn.Module:
    """The base with an adapter."""
    return PeftModel.from_pretrained(plain("base"), WORK / place, **settings)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of every prompt's last token, in eval mode."""
    model.eval()
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in truth()["prompts"]])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def weights(model: nn.Module, other: nn.Module) -> tuple[float, int]:
    """The largest difference of two models' weights, and how many weights differ."""
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(distance(a[name], b[name]) for name in a), sum(int((a[name] != b[name]).sum()) for name in a)


def loads_and_merges(what: str, place: str, system: str) -> None:
    """Beside the exported model: logits with the adapter, and weights after merge_and_unload."""
    exported, base = logits(plain(system)), logits(plain("base"))
    moved = distance(exported, base)
    model = adapted(place)
    zero_row(f"{what}: loaded", distance(logits(model), exported), moved, 1e-4)
    largest, count = weights(model.merge_and_unload(), plain(system))
    found = f"{count} weights differ from model/, by at most {largest:.3g}"
    row(f"{what}: merge_and_unload", found, largest < 1e-6)


def found_by_name(place: str, system: str) -> None:
    """AutoPeftModel finds the base by the adapter's own word."""
    model = AutoPeftModelForCausalLM.from_pretrained(WORK / place, dtype=torch.float32)
    exported, base = logits(plain(system)), logits(plain("base"))
    what = f"{place}: AutoPeftModelForCausalLM, the base by its name"
    zero_row(what, distance(logits(model), exported), distance(exported, base), 1e-4)


def weighed(first: str, second: str, kind: str) -> None:
    """Half of each of two adapters: the base plus half of both changes."""
    model = adapted(first, adapter_name="one")
    model.load_adapter(WORK / second, "two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type=kind)
    model.set_adapter("both")
    expected, base = plain("base"), plain("base").state_dict()
    ends = [plain(SYSTEMS[place]).state_dict() for place in (first, second)]
    expected.load_state_dict({name: base[name] + sum(0.5 * (end[name] - base[name]) for end in ends) for name in base})
    moved = distance(logits(expected), logits(plain("base")))
    what = f"add_weighted_adapter, {kind}: half of {first}, half of {second}"
    zero_row(what, distance(logits(model), logits(expected)), moved, 1e-4)


def saved_again(place: str) -> None:
    """save_pretrained, and loaded from there."""
    model = adapted(place)
    model.save_pretrained(WORK / "peft" / "again")
    again = PeftModel.from_pretrained(plain("base"), WORK / "peft" / "again")
    moved = distance(logits(model), logits(plain("base")))
    zero_row(f"{place}: saved and loaded again", distance(logits(again), logits(model)), moved)


def trained_on(place: str) -> None:
    """Twenty updates more."""
    model = adapted(place, is_trainable=True).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    losses = []
    for step in range(20):
        lesson = truth()["lessons"][step % 4]
        ids = torch.tensor([lesson["ids"]])
        labels = ids.clone()
        labels[:, : lesson["start"]] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    before, after = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    count = sum(p.numel() for p in params)
    row(f"{place}: trained on", f"loss {before:.3f} → {after:.3f}, {count} parameters", after < before)


def main() -> None:
    for what, (place, system) in ADAPTERS.items():
        loads_and_merges(what, place, system)
    found_by_name("run/adapter", "run")
    found_by_name("lora/adapter", "lora")
    weighed("one_rank", "second/adapter", "cat")
    weighed("run/adapter", "second/adapter", "cat")
    weighed("run/adapter", "lora/adapter", "cat")
    saved_again("run/adapter")
    trained_on("run/adapter")
    finish("peft", "transformers", "torch")


if __name__ == "__main__":
    main()
