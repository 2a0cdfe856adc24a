"""Runs the pages' Python on a toy model, without what only the engine needs; test_pages.py writes blocks.txt."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

HEAVY = ("transformers", "deepspeed", "peft", "datasets", "tyro", "sacrebleu", "scipy", "matplotlib", "tqdm")
ROWS = {(0, "gate", "row"): [1, 2], (1, "up", "row"): [5], (1, "down", "row"): [3]}


class FFN(nn.Module):
    """A gated FFN under Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 24, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(24, 8, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.ModuleDict({"mlp": FFN()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(layer["mlp"](x) for layer in self.model.layers)


def changed(block: str) -> dict[str, list[int]]:
    """The rows of each weight that differ after the block and an update by its `optimizer`."""
    model, batch = Toy(), torch.randn(5, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {"torch": torch, "model": model, "batch": batch}
    exec(block, names)
    if "step()" not in block:
        model(batch).sum().backward()
        names["optimizer"].step()
    after = model.state_dict()
    rows = {name: (after[name] != value).any(1).nonzero().flatten().tolist() for name, value in before.items()}
    return {name.removeprefix("model.layers.").removesuffix(".weight"): row for name, row in rows.items() if row}


def main() -> None:
    sys.modules |= dict.fromkeys((*HEAVY, "safetensors"))  # importing any of them fails
    diff, first, attach, second, kernels = Path("blocks.txt").read_text().split("\f")
    for block in (diff, first):
        assert changed(block) == {"0.mlp.up_proj": [3, 17]}, block
    exec(kernels, {})
    del sys.modules["safetensors"]
    from slicetune.engine.slices.neurons import NeuronSet

    widths, fan_in = {"gate": 24, "up": 24, "down": 8}, {"gate": 8, "up": 8, "down": 24}
    neurons = NeuronSet({key: torch.tensor(index) for key, index in ROWS.items()}, 2, widths, fan_in)
    neurons.save("neurons.safetensors")
    for block in (attach, second):
        expected = {"0.mlp.gate_proj": [1, 2], "1.mlp.up_proj": [5], "1.mlp.down_proj": [3]}
        assert changed(block) == expected, block


if __name__ == "__main__":
    main()
