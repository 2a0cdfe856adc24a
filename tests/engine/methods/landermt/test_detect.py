"""The detection pass against hooks and autograd in float64, one sentence at a time; batched, resumed, on two ranks."""

from __future__ import annotations

import pytest
import torch
import toys

from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt import detect as detecting
from slicetune.engine.methods.landermt.detect import detect, prompt_only
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.config import ScoreConfig

PAIRS = ("b-a", "a-b")


def prompts(count: int) -> list:
    return [prompt_only(example) for example in toys.examples(count)]


def sentences(count: int) -> list:
    made = toys.examples(count, seed=1)
    for example in made:
        example.target_start = 1
    return made


def empty(model) -> Detection:
    config = model.config
    return Detection(PAIRS, toys.LAYERS, getattr(config, "intermediate_size", 4 * toys.HIDDEN), toys.HIDDEN)


def activations(model, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """h and output of every layer's last projection, and the logits: hooks and nothing of the engine."""
    kept, handles = [], []
    for site in find_ffns(model):
        last = getattr(site.module, list(site.projections.values())[-1])
        handles.append(last.register_forward_hook(lambda m, args, out: kept.append((args[0], out))))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return [h for h, _ in kept], [y for _, y in kept], logits


def by_hand(model, config: ScoreConfig, count: int) -> Detection:
    """The definitions, sentence by sentence."""
    model, found = model.double(), empty(model)
    for example in prompts(count):
        hidden, output, _ = activations(model, example.input_ids)
        found.prompts[example.group] += 1
        for layer, (h, y) in enumerate(zip(hidden, output, strict=True)):
            found.hidden_sum[example.group, layer] += h.detach()[0].mean(0)
            found.output_sum[example.group, layer] += y.detach()[0].mean(0)
    for example in sentences(count):
        hidden, _, logits = activations(model, example.input_ids)
        loss = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(example.input_ids[1:]), reduction=config.loss
        )
        found.sentences[example.group] += 1
        for layer, (h, dh) in enumerate(zip(hidden, torch.autograd.grad(loss, hidden), strict=True)):
            product = (h * dh).detach()[0]
            phi = product.abs().mean(0) if config.token_reduce == "mean_abs" else product.sum(0).abs()
            found.awareness_sum[example.group, layer] += phi
    return found


def agree(got: Detection, want: Detection) -> None:
    assert torch.equal(got.prompts, want.prompts)
    assert torch.equal(got.sentences, want.sentences)
    for name in ("hidden_sum", "output_sum", "awareness_sum"):
        for one, other in zip(getattr(got, name).flatten(0, 1), getattr(want, name).flatten(0, 1), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize("model", [toys.model, toys.bloom], ids=["llama", "bloom"])
@pytest.mark.parametrize(
    "config",
    [ScoreConfig(tokens_per_batch=50), ScoreConfig(tokens_per_batch=50, token_reduce="abs_sum", loss="sum")],
    ids=["mean_abs", "abs_sum"],
)
def test_detection_equals_hooks_in_float64(model, config):
    found = empty(model())
    detect(model(), prompts(9), sentences(9), found, config)
    agree(found, by_hand(model(), config, 9))
    assert found.prompts.tolist() == [5, 4]


def test_packed_rows_too(monkeypatch):
    monkeypatch.setattr(detecting, "packs_long_rows", lambda model: True)
    found = empty(toys.model())
    detect(toys.model(), prompts(7), sentences(7), found, ScoreConfig(tokens_per_batch=60))
    agree(found, by_hand(toys.model(), ScoreConfig(), 7))


def whole(config: ScoreConfig, **more) -> Detection:
    found = empty(toys.model())
    detect(toys.model(), prompts(12), sentences(12), found, config, **more)
    return found


def test_two_ranks_equal_one(pool):
    one = whole(ScoreConfig(tokens_per_batch=60))
    for sums in pool.run("detect_toys", 12, 60):
        for name in ("prompts", "sentences"):
            assert torch.equal(sums[name], getattr(one, name))
        for name in ("hidden_sum", "output_sum", "awareness_sum"):
            torch.testing.assert_close(sums[name], getattr(one, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_resumed_pass_ends_with_the_same_bits(stop, tmp_path):
    """Stopped among the prompts, at their end, among the sentences."""
    config, path = ScoreConfig(tokens_per_batch=60), tmp_path / "part.safetensors"
    unbroken, partial = whole(config), empty(toys.model())

    def after(done: int) -> None:
        if done == stop:
            partial.save_part(path)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        detect(toys.model(), prompts(12), sentences(12), partial, config, after_batch=after)
    resumed, seen = empty(toys.model()), []
    resumed.take([path])
    detect(toys.model(), prompts(12), sentences(12), resumed, config, done=stop, progress=seen.append)
    assert sum(seen) == 24
    for name in Detection.SUMS:
        assert torch.equal(getattr(resumed, name), getattr(unbroken, name)), name


def test_target_tokens_are_refused():
    with pytest.raises(UserError, match=r"--score\.tokens target"):
        whole(ScoreConfig(tokens="target"))


def test_file_comes_back_exactly_and_a_bad_one_is_refused(tmp_path):
    found, path = whole(ScoreConfig()), tmp_path / "awareness.safetensors"
    found.save(path, {"run": 1})
    back = Detection.load(path)
    assert (back.pairs, back.languages, back.size, back.provenance) == (PAIRS, ("a", "b"), found.size, {"run": 1})
    assert all(torch.equal(getattr(back, name), getattr(found, name)) for name in Detection.SUMS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"awareness\.safetensors: its content is not what was written"):
        Detection.load(path)
    with pytest.raises(UserError, match="no such file"):
        Detection.load(tmp_path / "x")
