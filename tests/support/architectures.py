"""Small random models of many architectures, and how far each step of the engine is from an independent one.

python tests/support/architectures.py        # the table of engine/models/README.md
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slicetune.engine.common.checkpoint import MASTER
from slicetune.engine.data.batching import Example, pack, pad
from slicetune.engine.export import adapter, audit, delta
from slicetune.engine.export.model import export_model
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.load import load_model
from slicetune.engine.models.packing import takes_position_ids
from slicetune.engine.models.shapes import ModelShape, from_config
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.scoring.passes import ScoreTap
from slicetune.engine.slices import SparseColumnAdamW
from slicetune.engine.slices.ffn import attach, fuse
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.patches import slice_patches

VOCAB = 96
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, MLP biases": ("Llama", {"mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 8.0, "residual_multiplier": 0.3, "embedding_multiplier": 4.0}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 8}),
    "starcoder2": ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 8}),
    "stablelm": ("StableLm", {}),
    "exaone4": ("Exaone4", {"sliding_window": 8}),
    "nemotron": ("Nemotron", {"head_dim": 8}),
    "arcee": ("Arcee", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox, ReLU": ("GPTNeoX", {"hidden_act": "relu", "use_parallel_residual": False}),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 8, "resid_pdrop": 0.0}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {"ffn_hidden_size": 48, "alibi": False, "bias": True, "num_kv_heads": 4}),
    "falcon, ALiBi": ("Falcon", {"ffn_hidden_size": 48, "alibi": True, "new_decoder_architecture": False}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "resid_pdrop": 0.0}),
}
"""transformers' class and what is not of SIZES."""
STEPS, RATE = 3, 2e-2


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of MODELS, its biases too, in evaluation mode."""
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, **attention(config))
    for key, p in made.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(p, std=0.1)  # zero in a fresh model: a lost bias would not be seen
    made = made.to(dtype)
    made.config.use_cache = False
    return made.eval()


def attention(config: Any) -> dict[str, str]:
    """sdpa leaves out Gemma-2's cap without a word in transformers 5.17; the engine does not take it there."""
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def examples(count: int = 5) -> list[Example]:
    draw = random.Random(0)
    made = []
    for i in range(count):
        ids = [draw.randrange(3, VOCAB) for _ in range(draw.randint(6, 20))]
        made.append(Example(ids, draw.randint(2, len(ids) - 2), i % 2, f"toy/train/{i}"))
    return made


def neurons(shape: ModelShape) -> NeuronSet:
    """Some rows of every projection of one layer, and units (rows and columns) of the other."""
    first = {role: [0, 5, width - 1] for role, width in shape.widths.items()}
    chosen = {(0, role, "row"): torch.tensor(index) for role, index in first.items()}
    *inward, outward = shape.widths
    chosen |= {(1, role, "row"): torch.tensor([2, 7, 11, 40]) for role in inward}
    chosen[1, outward, "column"] = torch.tensor([2, 7, 11, 40])
    return NeuronSet(chosen, shape.layers, shape.widths, shape.fan_in)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def losses_alone(plain: nn.Module, given: list[Example]) -> Tensor:
    """Of each sentence by itself, by the model's own forward and torch's cross-entropy."""
    found = []
    for example in given:
        ids = torch.tensor([example.input_ids])
        logits, start = plain(ids, use_cache=False).logits[0].float(), example.target_start
        found.append(nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def batching(loaded: nn.Module, plain: nn.Module, given: list[Example]) -> float:
    """Losses of all sentences in one batch, packed if the model can and padded, against each one alone."""
    alone = losses_alone(plain, given)
    batches = [pad(given, 0)] + ([pack(given)] if takes_position_ids(loaded) else [])
    return max(float((target_losses(loaded, batch) - alone).abs().max()) for batch in batches)


def decoding(loaded: nn.Module, given: list[Example]) -> int:
    """How many tokens differ between greedy decoding in one left-padded batch and alone."""
    prompts = [example.input_ids[: example.target_start + 1] for example in given]
    together, alone = generated(loaded, prompts), [generated(loaded, [prompt])[0] for prompt in prompts]
    return sum(a != b for one, other in zip(together, alone, strict=True) for a, b in zip(one, other, strict=False))


def generated(loaded: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """As evaluation/translation.py has it: greedy, padded on the left, with a cache."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    loaded.generation_config.eos_token_id = None
    made = loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True)
    return made[:, width:].tolist()


def hooked(plain: nn.Module, example: Example) -> dict[tuple[int, str], Tensor]:
    """One sentence's mean |activation × gradient| of every channel by hooks and autograd."""
    outputs: dict[str, Tensor] = {}
    sites = find_ffns(plain)

    def keep(name: str, out: Tensor) -> Tensor:
        outputs[name] = out
        return out.clone()  # Falcon adds to it in place

    hooks = [
        plain.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: keep(name, out))
        for site in sites
        for name in site.layers()
    ]
    plain.requires_grad_(True)
    loss = losses_alone(plain, [example]).mean()
    grads = dict(zip(outputs, torch.autograd.grad(loss, [*outputs.values()]), strict=True))
    for hook in hooks:
        hook.remove()
    scores = {}
    for site in sites:
        for role in site.projections:
            rows = slice(site.first(role), site.first(role) + site.width(role))
            product = outputs[site.child(role)] * grads[site.child(role)]
            scores[site.layer, role] = product.detach().reshape(-1, product.shape[-1])[:, rows].abs().mean(0)
    return scores


class Recorder:
    """Stands where Statistics does and keeps every score."""

    def __init__(self) -> None:
        self.scores: dict[tuple[int, str], Tensor] = {}

    def add_samples(self, *_: Any) -> None: ...

    def add_units(self, *_: Any) -> None: ...

    def add_sums(self, layer, projection, sums, lengths, groups, reduce) -> None:
        self.scores[layer, projection] = sums / lengths[:, None]


def scoring(name: str, given: list[Example]) -> float:
    """The engine's scores of a padded batch against `hooked` in float64, the largest relative deviation."""
    recorder, fused = Recorder(), model(name)
    tap = ScoreTap(recorder, ScoreConfig())
    fused.requires_grad_(False)
    for ffn in fuse(fused):
        ffn.tap = tap
    batch = pad(given, 0)
    tap.begin(batch)
    losses = target_losses(fused, batch)
    sum(losses[batch.target_sample == i].mean() for i in range(len(given))).backward()
    wide, worst = model(name, torch.float64), 0.0
    for i, example in enumerate(given):
        worst = max(worst, *(relative(recorder.scores[k][i], want) for k, want in hooked(wide, example).items()))
    return worst


def trained(plain: nn.Module, chosen: NeuronSet, given: list[Example]) -> nn.Module:
    params = attach(plain, chosen)
    optimizer = SparseColumnAdamW(params, lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        target_losses(plain, pad(given, 0)).mean().backward()
        optimizer.step()
    return plain


@torch.no_grad()
def logits(of: nn.Module) -> Tensor:
    return of(torch.arange(3, 33).view(2, 15), use_cache=False).logits


def measure(name: str, work: Path) -> dict[str, float]:
    """Every deviation of one architecture: see the functions; `audit` is 0 where it passed."""
    base, out = work / "base", work / "run"
    plain, given = model(name), examples()
    plain.save_pretrained(base)
    loaded = load_model(str(base), ModelConfig(), torch.device("cpu"))
    shape = from_config(plain.config)
    assert shape.parameters == sum(p.numel() for p in plain.parameters())
    chosen, found = neurons(shape), {"batches": batching(loaded, plain, given), "decoding": decoding(loaded, given)}
    found["scores"] = scoring(name, given)
    live = trained(loaded, chosen, given)
    masters = {MASTER + key: p.detach() for key, p in live.named_parameters() if p.requires_grad}
    patches = slice_patches(base, chosen, masters)
    export_model(base, patches, out / "model")
    chosen.save(out / "neurons.safetensors")
    how = attention(plain.config)
    exported = AutoModelForCausalLM.from_pretrained(out / "model", **how).eval()
    before, after = logits(plain), logits(live)
    found["moved"] = float((after - before).abs().max())
    found["export"] = float((logits(exported) - after).abs().max())
    biased = any(key.endswith(".bias") for key in patches)
    delta.write(base, out / "model", patches, out / "delta")
    delta.subtract(out / "model", out / "delta", out / "back")
    found["delta"] = float((logits(AutoModelForCausalLM.from_pretrained(out / "back", **how)) - before).abs().max())
    if not biased:  # an adapter has none
        adapter.write(out / "delta", str(base), out / "adapter", own_ranks=True)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **how).eval(), out / "adapter")
        found["adapter"] = float((logits(adapted) - after).abs().max())
    found["audit"] = float(not audit.audit(base, out).ok)
    return found


def table() -> str:
    columns = ("batches", "decoding", "scores", "export", "delta", "adapter", "moved")
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in MODELS:
        with tempfile.TemporaryDirectory() as work:
            found = measure(name, Path(work))
        assert not found["audit"], name
        cells = [f"{found[c]:.1e}" if found.get(c) else "0" if c in found else "biases" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
