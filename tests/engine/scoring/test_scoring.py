"""Scores against plain autograd hooks in float64, one sentence at a time; packed, padded and two ranks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import toys
from sklearn.metrics import mutual_info_score
from transformers import BloomConfig, BloomForCausalLM

from slicetune.engine.data.batching import batches_by_tokens, pack, pad
from slicetune.engine.methods.caneft.selection import select
from slicetune.engine.models.load import checkpoint_activations
from slicetune.engine.models.shapes import from_config
from slicetune.engine.models.sites import find_ffns
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.loss import target_losses
from slicetune.engine.scoring.passes import ScoreTap, score
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.ffn import fuse

PROJECTIONS = ("gate", "up", "down")


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=toys.VOCAB, initializer_range=0.1)
    )
    model.config.use_cache = False
    return model.eval()


def by_hooks(model, example, config: ScoreConfig) -> dict[tuple[int, str], torch.Tensor]:
    """One sentence's scores by forward hooks and autograd.grad: the formulas and nothing of the engine."""
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for site in find_ffns(model):
        for role, child in site.projections.items():
            key = (site.layer, role)
            linear = getattr(site.module, child)
            hooks.append(linear.register_forward_hook(lambda m, a, out, key=key: outputs.__setitem__(key, out)))
    ids = torch.tensor([example.input_ids])
    for p in model.parameters():
        p.requires_grad_(True)
    logits = model(ids, use_cache=False).logits[0]
    start = example.target_start
    loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction=config.loss)
    grads = torch.autograd.grad(loss, list(outputs.values()))
    for hook in hooks:
        hook.remove()
    rows = slice(start - 1, len(example.input_ids) - 1) if config.tokens == "target" else slice(None)
    scores = {}
    for key, gradient in zip(outputs, grads, strict=True):
        product = (outputs[key] * gradient).detach().reshape(-1, gradient.shape[-1])[rows]
        scores[key] = product.abs().mean(0) if config.token_reduce == "mean_abs" else product.sum(0).abs()
    return scores


class Recorder:
    """Stands where Statistics does and keeps every score, in the order of sentences."""

    def __init__(self, uids: list[str]) -> None:
        self.row = {uid: i for i, uid in enumerate(uids)}
        self.scores: dict[tuple[int, str], torch.Tensor] = {}
        self.batch: list[str] = []

    def add_samples(self, groups, tokens) -> None: ...

    def add_units(self, layer, active, activation, lengths, groups) -> None: ...

    def add_sums(self, layer, projection, sums, lengths, groups, reduce) -> None:
        scores = sums / lengths[:, None] if reduce == "mean_abs" else sums.abs()
        kept = self.scores.setdefault((layer, projection), torch.full((len(self.row), scores.shape[1]), torch.nan))
        kept[[self.row[uid] for uid in self.batch]] = scores.float()


def by_engine(model, examples, config: ScoreConfig, packed: bool) -> dict[tuple[int, str], torch.Tensor]:
    recorder = Recorder([e.uid for e in examples])
    tap = ScoreTap(recorder, config)
    model.requires_grad_(False)
    for ffn in fuse(model):
        ffn.tap = tap
    batch = pack(examples) if packed else pad(examples, 0)
    recorder.batch = batch.uids
    tap.begin(batch)
    losses = target_losses(model, batch)
    total = sum(getattr(losses[batch.target_sample == s], config.loss)() for s in range(len(examples)))
    total.backward()
    return recorder.scores


READINGS = [
    ScoreConfig(),
    ScoreConfig(loss="sum"),
    ScoreConfig(tokens="target"),
    ScoreConfig(token_reduce="abs_sum"),
    ScoreConfig(loss="sum", tokens="target", token_reduce="abs_sum"),
]


@pytest.mark.parametrize("config", READINGS, ids=lambda c: f"{c.loss}-{c.tokens}-{c.token_reduce}")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_scores_equal_hooks_in_float64(config, packed):
    examples = toys.examples(7)
    got = by_engine(toys.model(), examples, config, packed)
    reference = toys.model(dtype=torch.float64)
    for i, example in enumerate(examples):
        for key, expected in by_hooks(reference, example, config).items():
            assert (got[key][i] - expected).norm() <= 1e-5 * expected.norm(), (key, i)


def test_bloom_scores_equal_hooks_in_float64():
    examples = toys.examples(5)
    got = by_engine(bloom(), examples, ScoreConfig(), packed=False)
    reference = bloom().double()
    for i, example in enumerate(examples):
        for key, expected in by_hooks(reference, example, ScoreConfig()).items():
            assert (got[key][i] - expected).norm() <= 1e-5 * expected.norm(), (key, i)


def statistics(model, examples, config: ScoreConfig, **ranks) -> Statistics:
    stats = Statistics(["a", "b"], from_config(model.config))
    score(model, examples, stats, config, **ranks)
    return stats


def test_statistics_hold_what_single_sentences_give():
    examples = toys.examples(9)
    stats = statistics(toys.model(), examples, ScoreConfig(tokens_per_batch=60))
    reference = toys.model(dtype=torch.float64)
    each = [by_hooks(reference, e, ScoreConfig()) for e in examples]
    for projection in PROJECTIONS:
        for group in (0, 1):
            mine = [e for e, x in zip(each, examples, strict=True) if x.group == group]
            for layer in range(toys.LAYERS):
                expected = torch.stack([scores[layer, projection] for scores in mine]).sum(0)
                got = stats.total[projection][group, layer]
                assert (got - expected).norm() <= 1e-5 * expected.norm()
                assert torch.equal(
                    stats.histogram[projection][group, layer].sum(-1), torch.full_like(got, len(mine)).int()
                )
    assert stats.samples.tolist() == [5, 4]
    assert int(stats.tokens.sum()) == sum(len(e.input_ids) for e in examples)


def keep_input(kept: dict, key: tuple[str, int], module: torch.nn.Module, args: tuple) -> None:
    kept[key] = args[0]


def test_activity_is_counted_over_unpadded_tokens():
    examples = toys.examples(6)
    stats = statistics(toys.model(), examples, ScoreConfig(tokens_per_batch=50))
    model = toys.model()
    active, means = torch.zeros(2, 2, toys.INTERMEDIATE), torch.zeros(2, 2, toys.INTERMEDIATE, dtype=torch.float64)
    for example in examples:
        seen: dict[tuple[str, int], torch.Tensor] = {}
        hooks = []
        for site in find_ffns(model):
            keep_g = partial(keep_input, seen, ("g", site.layer))
            keep_h = partial(keep_input, seen, ("h", site.layer))
            hooks.append(site.module.act_fn.register_forward_pre_hook(keep_g))
            hooks.append(site.module.down_proj.register_forward_pre_hook(keep_h))
        model(torch.tensor([example.input_ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer in (0, 1):
            active[example.group, layer] += (seen["g", layer][0] > 0).sum(0)
            means[example.group, layer] += seen["h", layer][0].double().mean(0)
    assert torch.equal(stats.active, active.long())
    assert (stats.activation - means).norm() <= 1e-5 * means.norm()


def test_batch_size_changes_no_count():
    """Bins are counts: other batches may move a score by a rounding, and with it at most the odd count of a bin."""
    examples = toys.examples(12)
    small = statistics(toys.model(), examples, ScoreConfig(tokens_per_batch=25))
    large = statistics(toys.model(), examples, ScoreConfig(tokens_per_batch=400))
    for projection in PROJECTIONS:
        moved = (small.histogram[projection] - large.histogram[projection]).abs().sum()
        assert moved <= 0.001 * small.histogram[projection].sum()


def test_same_run_same_bits():
    examples = toys.examples(12)
    one, two = (statistics(toys.model(), examples, ScoreConfig(tokens_per_batch=90)) for _ in range(2))
    for projection in PROJECTIONS:
        assert torch.equal(one.histogram[projection], two.histogram[projection])
        assert torch.equal(one.total[projection], two.total[projection])


def test_activation_checkpointing_changes_no_bit():
    """It does take effect in evaluation mode, and taps count once: in the backward, not in the recomputation."""
    examples, config = toys.examples(12), ScoreConfig(tokens_per_batch=90)
    plain, model = statistics(toys.model(), examples, config), toys.model()
    checkpoint_activations(model)
    calls = []
    fuse(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = statistics(model, examples, config)
    assert len(calls) == 2 * sum(1 for _ in batches_by_tokens(examples, 90, packed=False))
    for projection in PROJECTIONS:
        assert torch.equal(plain.histogram[projection], again.histogram[projection])
    assert not any(m.training for m in model.modules())


def test_two_ranks_count_what_one_does(pool):
    examples = toys.examples(12)
    alone = statistics(toys.model(), examples, ScoreConfig(tokens_per_batch=60))
    for histogram, samples in pool.run("score_toys", 12, 60):
        assert torch.equal(samples, alone.samples)
        for projection in PROJECTIONS:
            assert torch.equal(histogram[projection], alone.histogram[projection])


def test_no_weight_gradient_and_no_tap_is_left():
    model = toys.model()
    statistics(model, toys.examples(4), ScoreConfig())
    assert all(p.grad is None for p in model.parameters())
    assert all(ffn.tap is None for ffn in fuse(model))


def deciles_of_fine_bins(scores: np.ndarray) -> np.ndarray:
    """Streamed deciles by hand, column by column: eight bins an octave, a bin goes to the decile of its middle."""
    fine = ((scores.astype(np.float32).view(np.int32) >> 20) - ((127 - 40) << 3)).clip(0, 255)
    labels = np.empty(scores.shape, dtype=int)
    for n in range(scores.shape[1]):
        for b in np.unique(fine[:, n]):
            below, inside = (fine[:, n] < b).sum(), (fine[:, n] == b).sum()
            labels[fine[:, n] == b, n] = int(10 * (below + inside / 2) / len(scores))
    return labels


def test_selection_equals_an_independent_computation():
    """Scores by hooks in float64, deciles and shares by hand, MI by sklearn: the same neurons."""
    examples = toys.examples(120, longest=14)
    reference = toys.model(dtype=torch.float64)
    rows = [by_hooks(reference, e, ScoreConfig()) for e in examples]
    order = [(layer, p) for layer in range(toys.LAYERS) for p in PROJECTIONS]
    scores = torch.stack([torch.cat([r[key] for key in order]) for r in rows]).numpy()
    groups = np.array([e.group for e in examples])
    labels = deciles_of_fine_bins(scores)
    information = np.array([mutual_info_score(groups, labels[:, n]) for n in range(scores.shape[1])])
    importance = (scores[groups == 0].mean(0) + scores[groups == 1].mean(0)) / 2
    relevant = np.argsort(-importance)[: round(0.5 * len(importance))]

    stats = statistics(toys.model(), examples, ScoreConfig())
    chosen = select(stats, consensus="joint", task_ratio=0.5, neuron_ratio=0.1)
    # A score on the edge of a bin may fall to its other side in float32: a few neurons' MI, by a sentence's worth.
    different = np.abs(chosen.mi.numpy() - information) > 1e-6
    assert different.mean() < 0.02
    wanted = relevant[np.argsort(-information[relevant], kind="stable")][: chosen.neurons.count]
    assert len(wanted) == round(0.1 * len(importance))
    assert len(set(wanted.tolist()) ^ set(chosen.neurons.flat().tolist())) <= 2
