"""The loss from hidden states: against whole logits, in float64, in how much memory, and by whom it is computed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor

from slicetune.engine.data.batching import pack, pad
from slicetune.engine.scoring import cross_entropy
from slicetune.engine.scoring.cross_entropy import loss_path, token_losses
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.scoring.passes import backpropagate

TOKENS, HIDDEN, VOCAB = 23, 16, 50


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """However few logits there are, they go through chunks."""
    monkeypatch.setattr(cross_entropy, "FEW", 0)


def drawn(dtype: torch.dtype = torch.float32, trained: bool = False, bias: bool = False) -> tuple:
    """hidden, weight, bias, target."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCAB, HIDDEN) * 2).to(dtype).requires_grad_(trained)
    b = torch.randn(VOCAB).to(dtype).requires_grad_(trained) if bias else None
    return hidden, weight, b, torch.randint(0, VOCAB, (TOKENS,))


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cap: float | None) -> Tensor:
    """The same with all logits."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="none")


@pytest.fixture(autouse=True, params=[4 * VOCAB, 1 << 26], ids=["chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", request.param)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_losses_and_gradients_in_float64(trained, bias, cap):
    inputs = drawn(torch.float64, trained, bias)
    weights = torch.rand(TOKENS, dtype=torch.float64)  # every token's own, as batches and ranks give them
    wanted = [t for t in inputs[:3] if t is not None and t.requires_grad]
    mine, theirs = token_losses(*inputs, cap), whole(*inputs, cap)
    assert torch.allclose(mine, theirs, rtol=1e-13, atol=0)
    expected = torch.autograd.grad((theirs * weights).sum(), wanted)
    for got, want in zip(torch.autograd.grad((mine * weights).sum(), wanted), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("trained", [False, True])
def test_losses_in_float32_and_without_a_gradient(trained):
    inputs = drawn(torch.float32, trained)
    expected = whole(*inputs, None)
    assert torch.allclose(token_losses(*inputs), expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(token_losses(*inputs), token_losses(*inputs))
        assert torch.allclose(token_losses(*inputs), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_bf16_weights_give_fp32_losses_and_gradients_within_rounding(trained):
    inputs = drawn(torch.bfloat16, trained)
    exact = tuple(None if t is None else t.detach().double() if t.is_floating_point() else t for t in inputs)
    exact[0].requires_grad_()
    losses = token_losses(*inputs)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, whole(*inputs, None))
    (got,) = torch.autograd.grad(losses.mean(), inputs[:1])
    (want,) = torch.autograd.grad(whole(*exact, None).mean(), exact[:1])
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("batch", [pack, lambda examples: pad(examples, 0)], ids=["packed", "padded"])
def test_a_models_losses_are_those_of_its_logits(batch):
    """Forward and, of every parameter with tied embeddings, backward."""
    model, made = toys.model(), batch(toys.examples(5))
    model.lm_head.weight = model.model.embed_tokens.weight
    own = {} if made.position_ids is None else {"position_ids": made.position_ids}
    logits = model(made.input_ids, use_cache=False, **own).logits.flatten(0, 1)[made.predict]
    expected = F.cross_entropy(logits, made.target, reduction="none")
    losses = target_losses(model, made)
    assert torch.allclose(losses, expected, rtol=1e-6, atol=0)
    assert "forward" not in vars(model.lm_head)
    params = list(model.parameters())
    pairs = (torch.autograd.grad(x.square().sum(), params) for x in (losses, expected))
    for got, want in zip(*pairs, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_128k_logits_never_stand_whole(monkeypatch):
    """The most that forward and backward hold at a time, exactly, against the logits of all tokens in fp32."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 1 << 22)  # 32 rows
    tokens, vocabulary, logits = 512, 128_256, 512 * 128_256 * 4
    for trained in (False, True):
        hidden = torch.randn(tokens, 8, requires_grad=True)
        weight = torch.randn(vocabulary, 8, requires_grad=trained)
        target = torch.randint(0, vocabulary, (tokens,))
        held = peak(lambda h=hidden, w=weight, t=target: token_losses(h, w, None, t).mean().backward())
        assert held < 0.25 * logits, trained
        with torch.no_grad():
            assert peak(lambda h=hidden, w=weight, t=target: token_losses(h, w, None, t)) < 0.25 * logits
    inputs = hidden, weight.detach(), None, target, None
    assert peak(lambda: whole(*inputs).mean().backward()) > 2 * logits  # what it is compared with


@pytest.mark.parametrize(("cap", "size"), [(None, 8), (30.0, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimates_bytes_are_what_a_chunk_holds(monkeypatch, dtype, cap, size):
    """memory.py counts 8 bytes a logit of a chunk, 12 where they are capped."""
    rows, vocabulary = 8, 20_000
    monkeypatch.setattr(cross_entropy, "CHUNK", rows * vocabulary)
    hidden = torch.randn(4 * rows, 8).to(dtype).requires_grad_()
    inputs = hidden, torch.randn(vocabulary, 8).to(dtype), None, torch.randint(0, vocabulary, (4 * rows,))
    held = peak(lambda: token_losses(*inputs, cap).mean().backward())
    assert held == pytest.approx(size * rows * vocabulary, rel=0.01)


def peak(run) -> int:
    """The most bytes of tensors that `run` holds at a time: the profiler's record of every allocation, replayed."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
        held += change
        most = max(most, held)
    return most


def stub(seen: list) -> ModuleType:
    """Liger's module, whose function computes what Liger's does: each token's loss and its own gradient."""

    def fused_linear_cross_entropy_forward(_input, weight, target, *, bias, reduction, softcap):
        assert reduction == "none"
        assert not weight.requires_grad
        seen.append(softcap)
        with torch.enable_grad():
            losses = whole(_input, weight, bias, target, softcap)
            pulls = torch.autograd.grad(losses.sum(), _input)[0]
        return losses.detach(), None, None, None, pulls, None, None

    module = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    module.fused_linear_cross_entropy_forward = fused_linear_cross_entropy_forward
    return module


def test_liger_is_taken_where_it_is_installed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cross_entropy.importlib.util, "find_spec", lambda name: name)
    assert loss_path(torch.device("cpu")) == "chunks"
    assert loss_path(torch.device("cuda")) == "Liger"
    monkeypatch.setattr(cross_entropy.importlib.util, "find_spec", lambda name: None)
    assert loss_path(torch.device("cuda")) == "chunks"


@pytest.mark.parametrize("cap", [None, 3.0])
def test_ligers_gradients_are_weighted_token_by_token(monkeypatch, cap):
    seen, inputs, weights = [], drawn(torch.float64), torch.rand(TOKENS, dtype=torch.float64)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", stub(seen))
    (expected,) = torch.autograd.grad((whole(*inputs, cap) * weights).sum(), inputs[:1])
    monkeypatch.setattr(cross_entropy, "loss_path", lambda device: "Liger")
    (got,) = torch.autograd.grad((token_losses(*inputs, cap) * weights).sum(), inputs[:1])
    assert seen == [cap]
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-13)


def test_scoring_takes_the_same_path(monkeypatch):
    """backpropagate through a frozen model: the gradient at the first block's input is that of whole logits."""
    model, batch = toys.model().requires_grad_(False), pack(toys.examples(4))
    found = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0].requires_grad_()))
    backpropagate(model, batch, "sum")
    got, other = found[0].grad, found.pop().detach().clone().requires_grad_()
    logits = model(inputs_embeds=other, position_ids=batch.position_ids, use_cache=False).logits[0][batch.predict]
    (want,) = torch.autograd.grad(F.cross_entropy(logits, batch.target, reduction="sum"), other)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_few_logits_are_torchs_own(monkeypatch, cap):
    """The same losses and gradients to rounding, and to the bit those of the plain formula."""
    hidden, target = torch.randn(7, 6, requires_grad=True), torch.randint(0, 11, (7,))
    weight, bias = torch.randn(11, 6, requires_grad=True), torch.randn(11, requires_grad=True)
    found = []
    for few in (0, 77):
        monkeypatch.setattr(cross_entropy, "FEW", few)
        losses = token_losses(hidden, weight, bias, target, cap)
        found.append((losses, *torch.autograd.grad(losses.mean(), (hidden, weight, bias))))
    for chunked, plain in zip(*found, strict=True):
        assert torch.allclose(chunked, plain, rtol=1e-5, atol=1e-6)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    assert torch.equal(found[1][0], torch.nn.functional.cross_entropy(logits, target, reduction="none"))


@pytest.mark.parametrize("trained", [False, True])
def test_under_autocast_as_torch_does(trained):
    """A float32 hidden state and a bfloat16 head, or the other way round: products in autocast's dtype."""
    hidden, target = torch.randn(7, 6, requires_grad=True), torch.randint(0, 11, (7,))
    weight = torch.randn(11, 6, requires_grad=trained)
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_losses(hidden, weight, None, target)
        want = whole(hidden, weight, None, target, None)
    assert torch.allclose(losses, want, rtol=1e-5)
    (got,), (expected,) = (torch.autograd.grad(x.sum(), [hidden]) for x in (losses, want))
    assert torch.allclose(got, expected, rtol=2e-2, atol=2e-2)
