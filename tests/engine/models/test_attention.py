"""Which attention is taken, packed rows sample by sample, and right-padded rows without a mask."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import toys
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.batching import pack, pad
from slicetune.engine.models import attention
from slicetune.engine.models.attention import VARLEN, attention_path, inputs_of
from slicetune.engine.models.packing import packs_long_rows
from slicetune.engine.scoring.loss import target_losses

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
GEMMA2 = {"model_type": "gemma2", "hidden_size": 3584, "num_attention_heads": 16, "head_dim": 256}
GEMMA2["attn_logit_softcapping"] = 50.0
BLOOM = {"model_type": "bloom", "n_embed": 4096, "n_head": 32}
BF16, FP32 = torch.bfloat16, torch.float32
EXTRA = {"gemma2": {"head_dim": 8, "sliding_window": 5}, "mistral": {"sliding_window": 5}, "llama": {}, "qwen2": {}}


def model(kind: str, path: str = "sdpa", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two layers, two heads of keys for four of queries; windows of five tokens where the kind has them."""
    if kind == "bloom":
        return toys.bloom(dtype=dtype)
    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": toys.VOCAB, "initializer_range": 0.2, "pad_token_id": 0}
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **EXTRA[kind]), attn_implementation=path
    )
    made.config.use_cache = False
    return made.to(dtype).eval()


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, also: Tensor, longest: int, longest_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch's varlen_attn computes, a sample and a head after the other. query [T, heads, D]."""
    assert bounds.dtype == torch.int32
    assert torch.equal(bounds, also)
    assert longest == longest_k == int(bounds.diff().max())
    assert window_size[1] == 0
    group, rows = query.shape[1] // key.shape[1], []
    assert group == 1 or enable_gqa
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = query[begin:end], key[begin:end], value[begin:end]
        far = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (far >= 0) & (far <= (window_size[0] if window_size[0] >= 0 else end))
        heads = []
        for head in range(query.shape[1]):
            scores = q[:, head] @ k[:, head // group].T * scale
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head // group])
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows)


@pytest.fixture
def varlen(monkeypatch):
    calls = []
    attention.load_varlen()
    monkeypatch.setattr(attention.varlen, "varlen_attn", lambda *a, **k: calls.append(1) or stand_in(*a, **k))
    monkeypatch.setattr(attention, "TAKES_GQA", True)
    return calls


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_packed_rows_equal_samples_alone(varlen, kind, monkeypatch):
    """Losses of the varlen path in one row, against sdpa's of every sample; gradients of every parameter."""
    monkeypatch.setattr(attention, "_bounds", None)  # where samples begin is told once a batch, not asked in a layer
    packed, alone = model(kind, VARLEN, torch.float64), model(kind, "sdpa", torch.float64)
    samples = toys.examples(5)
    assert packs_long_rows(packed)
    assert not packs_long_rows(alone)
    got = target_losses(packed, pack(samples))
    assert len(varlen) == 2
    want = torch.cat([target_losses(alone, pack([sample])) for sample in samples])
    assert torch.allclose(got, want, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(x.sum(), list(m.parameters())) for x, m in ((got, packed), (want, alone))]
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*grads, strict=True))


def test_keys_are_repeated_where_torch_takes_no_fewer(varlen, monkeypatch):
    monkeypatch.setattr(attention, "TAKES_GQA", False)
    samples = toys.examples(3)
    losses = [target_losses(model("llama", path), pack(samples)) for path in (VARLEN, "sdpa")]
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_forward_that_does_not_say_where_samples_begin(varlen, kind):
    """Somebody's own call with position_ids alone, and padded rows."""
    batch = pack(toys.examples(4))
    ours, theirs = model(kind, VARLEN), model(kind)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    assert torch.allclose(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
    rows = pad(toys.examples(4), 0)
    assert torch.allclose(target_losses(ours, rows), target_losses(theirs, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_decoding_from_left_padded_prompts(varlen, kind):
    """A mask or a cache: sdpa's way, token for token."""
    prompts = [example.input_ids for example in toys.examples(4)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    for rows in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        made = [model(kind, path).generate(**rows, **settings) for path in (VARLEN, "sdpa")]
        assert torch.equal(*made)


PATHS = [(kind, path) for kind in ("llama", "qwen2", "mistral") for path in ("sdpa", "eager")]


@pytest.mark.parametrize(("kind", "path"), [*PATHS, ("gemma2", "eager"), ("bloom", "eager")])
def test_rows_padded_on_the_right_need_no_mask(kind, path):
    """Logits at every real token with a mask over the padding and without; windows of five tokens hold in both."""
    made, batch = model(kind, path), pad(toys.examples(6), 7)
    real = torch.arange(batch.input_ids.shape[1]) < (batch.segments[:, 1] - batch.segments[:, 0])[:, None]
    with torch.no_grad():
        masked = made(batch.input_ids, attention_mask=real.long(), use_cache=False).logits
        plain = made(**inputs_of(made, batch)).logits
    assert torch.allclose(plain[real], masked[real], rtol=1e-6, atol=1e-6)
    assert not real.all()


def gpu(monkeypatch, flash: bool = False, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if flash else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)


def test_auto_takes_the_first_that_can_be_had(monkeypatch):
    for about, expected in ((LLAMA, "sdpa"), (GEMMA2, "eager"), (BLOOM, "eager")):
        assert attention_path("auto", CPU, about, FP32) == expected
    gpu(monkeypatch)
    assert attention_path("auto", CUDA, LLAMA, BF16) == VARLEN
    assert attention_path("varlen", CUDA, LLAMA, BF16) == VARLEN
    assert attention_path("auto", CUDA, LLAMA, FP32) == "sdpa"
    assert attention_path("auto", CUDA, LLAMA | {"attention_dropout": 0.1}, BF16) == "sdpa"
    assert attention_path("auto", CUDA, LLAMA | {"head_dim": 512}, BF16) == "sdpa"
    assert attention_path("auto", CUDA, GEMMA2, BF16) == "eager"
    assert attention_path("auto", CUDA, BLOOM, BF16) == "eager"
    gpu(monkeypatch, capability=(7, 5))
    assert attention_path("auto", CUDA, LLAMA, BF16) == "sdpa"
    gpu(monkeypatch, flash=True)
    assert attention_path("auto", CUDA, LLAMA, BF16) == "flash_attention_2"
    assert attention_path("auto", CUDA, GEMMA2, BF16) == "flash_attention_2"
    assert attention_path("auto", CUDA, BLOOM, BF16) == "eager"


def test_what_cannot_be_had_is_refused_in_one_line(monkeypatch):
    for choice, match in (("flash", "needs a GPU and `pip install"), ("varlen", "needs an NVIDIA GPU")):
        with pytest.raises(UserError, match=match):
            attention_path(choice, CPU, LLAMA, FP32)
    gpu(monkeypatch)
    for about, dtype, match in (
        (GEMMA2, BF16, "caps no scores"),
        (LLAMA, FP32, "computes no torch.float32"),
        (LLAMA | {"head_dim": 260}, BF16, "heads of up to 256, a multiple of 8, not of 260"),
        (LLAMA | {"attention_dropout": 0.1}, BF16, "no dropout"),
        (BLOOM, BF16, "bloom does not support it: use auto"),
    ):
        with pytest.raises(UserError, match=match):
            attention_path("varlen", CUDA, about, dtype)
    with pytest.raises(UserError, match="gemma2 does not support it: use auto"):
        attention_path("sdpa", CUDA, GEMMA2, BF16)
    with pytest.raises(UserError, match="'nonesuch' is not one"):
        attention_path("auto", CPU, {"model_type": "nonesuch"}, FP32)


def test_a_start_does_not_wait_for_torchs_compiler():
    """Importing it takes a second, of every command and every rank."""
    code = "import sys, slicetune.engine.run.job; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
