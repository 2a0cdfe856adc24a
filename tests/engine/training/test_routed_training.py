"""Routed training under real DeepSpeed on two ranks: what a pair does not own stays as it was, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import toys
from rank_pool import Pool

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.landermt.routing import attach, owned_units
from slicetune.engine.slices.groups import EVERY_UPDATE, UpdateGroup, activate, optimizer_groups
from slicetune.engine.training.order import PairOrder
from slicetune.engine.training.train import Setup, train

STAGES = (1, 2, 3)
# Each rank reads one micro-batch an update: accumulation 1, and mostly of two different pairs.
SETTINGS = {
    "data_train_sentences": 31,
    "train_global_batch_size": 8,
    "train_micro_batch_size": 4,
    "train_max_steps": 6,
    "train_epochs": 4,
    "train_save_steps": 3,
    "train_save_total_limit": 9,
}
EVERYTHING = {"attention": True, "share_rate": 30.0, "routes": {"car": "learned"}}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert (a[name] - value).norm() <= tolerance * value.norm(), name


def masters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}


def at_three(run: Path, out: Path) -> None:
    """The run as it was when it had made three of its six updates."""
    shutil.copytree(run / "checkpoints" / "step-3", out / "checkpoints" / "step-3")


@pytest.fixture(scope="module")
def unbroken(pool, tmp_path_factory):
    """{stage: (tensors, group steps, folder)}: BLOOM's slices, its blocks' rest and learned shares."""
    runs = {}
    for stage in STAGES:
        out, settings = tmp_path_factory.mktemp(f"stage{stage}"), SETTINGS | {"zero_stage": stage}
        runs[stage] = *pool.run("train_routed", str(out), settings, "bloom", None, EVERYTHING)[0], out
    return runs


@pytest.fixture(scope="module")
def llama(pool, tmp_path_factory):
    """Two ranks on a Llama, of whose two layers one pair leaves one alone: (folder, tensors, group steps)."""
    out = tmp_path_factory.mktemp("llama")
    return out, *pool.run("train_routed", str(out), SETTINGS, "model", None, {})[0]


def test_stages_agree_bit_for_bit(unbroken):
    for stage in (2, 3):
        assert equal(unbroken[1][0], unbroken[stage][0])
        assert unbroken[1][1] == unbroken[stage][1]


def test_all_of_it_is_trained_and_counted_by_its_pairs(unbroken):
    tensors, steps, _ = unbroken[1]
    model, routes = toys.bloom(), toys.routes(4 * toys.HIDDEN, car="learned")
    attach(model, routes, routes.pairs, attention=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(tensors[f"master/{name}"], p.detach()), name
    examples = toys.examples(31, groups=3)
    order, counts = PairOrder(0, [e.group for e in examples], 2, 4), dict.fromkeys(steps, 0)
    for step in range(6):
        names = {routes.pairs[examples[i].group] for i in order.update(*divmod(step, order.updates_per_epoch))}
        for key in counts:
            counts[key] += not names.isdisjoint(key.split(" x")[0].split())
    assert steps == counts
    assert min(counts.values()) < 6  # a group that some update leaves out


def test_equals_plain_torch_in_float64(llama):
    """The same updates written out by hand: dense weights, a masked FFN, one torch.optim.AdamW a set of pairs."""
    _, tensors, _ = llama
    model, routes = toys.model(dtype=torch.float64).requires_grad_(True), toys.routes()
    now = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.forward = lambda x, mlp=block.mlp, layer=layer: plain_mlp(mlp, x, now["row"], routes, layer)
    params, slices, groups = dict(model.named_parameters()), [], {}
    for layer in (0, 1):
        for owner, (units, pairs) in owned_units(routes, layer).items():
            for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
                weight = params[f"model.layers.{layer}.mlp.{role}_proj.weight"]
                value = (weight[:, units].t() if axis else weight[units]).detach().clone()
                kind = "columns" if axis else "rows"
                slices.append((f"model.layers.{layer}.mlp.{role}_proj.{kind}.{owner}", value, weight, units, axis))
                groups.setdefault(pairs, []).append(value)
    optimizers = {pairs: torch.optim.AdamW(values, lr=1e-2, weight_decay=0.1) for pairs, values in groups.items()}
    examples = toys.examples(31, groups=3)
    order = PairOrder(0, [e.group for e in examples], 2, 4)
    for step in range(6):
        update = [examples[i] for i in order.update(*divmod(step, order.updates_per_epoch))]
        tokens, loss = sum(len(e.input_ids) - e.target_start for e in update), 0.0
        for e in update:
            now["row"], ids = e.group, torch.tensor([e.input_ids])
            logits = model(ids, use_cache=False).logits[0, e.target_start - 1 : -1]
            loss = loss + F.cross_entropy(logits, ids[0, e.target_start :], reduction="sum")
        model.zero_grad()
        (loss / tokens).backward()
        for _, value, weight, units, axis in slices:
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            value.grad = grad[:, units].t() if axis else grad[units]
        for pairs, optimizer in optimizers.items():
            if not pairs.isdisjoint(routes.pairs[e.group] for e in update):
                optimizer.step()
        with torch.no_grad():
            for _, value, weight, units, axis in slices:
                weight.index_copy_(axis, units, value.t() if axis else value)
    close({n: t.double() for n, t in masters(tensors).items()}, {name: value for name, value, *_ in slices})


def plain_mlp(mlp, x, row, routes, layer):
    c = routes.gains(layer)[row].double()
    weights = [linear.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    gate, up, down = weights if routes.takes[row, layer] else [w.detach() for w in weights]
    h = F.silu(c * F.linear(x, gate)) * (c * F.linear(x, up))
    return F.linear(h.masked_fill(c == 0, 0), down)


@pytest.mark.parametrize("stage", STAGES)
def test_units_of_other_pairs_keep_every_bit(pool, llama, tmp_path, stage):
    """Three updates of all pairs, then three of en-fr alone, with weight decay and momentum on."""
    at_three(llama[0], tmp_path)
    before, state = checkpoint.load(tmp_path / "checkpoints" / "step-3")
    after, now = pool.run("train_routed", str(tmp_path), SETTINGS | {"zero_stage": stage}, "model", 2, {})[0]
    was = state["group_steps"]
    routes, kept, moved = toys.routes(), 0, 0
    for layer in (0, 1):
        for owner, (_, pairs) in owned_units(routes, layer).items():
            for name in (n for n in before if f"layers.{layer}." in n and n.endswith(f".{owner}")):
                assert torch.equal(before[name], after[name]) == ("en-fr" not in pairs), name
                kept, moved = kept + ("en-fr" not in pairs), moved + ("en-fr" in pairs)
    assert kept >= 9
    assert moved >= 27
    assert was.keys() == now.keys()
    assert {now[key] - was[key] for key in now if "en-fr" in key} == {3}
    assert {now[key] - was[key] for key in now if "en-fr" not in key} == {0}


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_equals_unbroken(pool, unbroken, tmp_path, stage):
    whole, counts, folder = unbroken[stage]
    at_three(folder, tmp_path)
    settings = SETTINGS | {"zero_stage": stage}
    tensors, steps = pool.run("train_routed", str(tmp_path), settings, "bloom", None, EVERYTHING)[0]
    assert equal(tensors, whole)
    assert steps == counts


def test_a_checkpoint_without_step_counts_of_its_groups_is_refused(pool, llama, tmp_path):
    at_three(llama[0], tmp_path)
    folder = tmp_path / "checkpoints" / "step-3"
    tensors, state = checkpoint.load(folder)
    del state["group_steps"]
    checkpoint.save(folder, tensors, state)
    says = rf"{folder} does not say how many updates .*en-fr.* took part in: use another --out"
    with pytest.raises(AssertionError, match=says):
        pool.run("train_routed", str(tmp_path), SETTINGS, "model", None, {})


def test_bf16_stages_agree_and_resume(pool, tmp_path):
    settings, runs = SETTINGS | {"model_dtype": "bfloat16", "train_learning_rate": 1e-5}, {}
    learned = {"routes": {"car": "learned"}}
    for stage in STAGES:
        one = settings | {"zero_stage": stage}
        runs[stage] = pool.run("train_routed", str(tmp_path / str(stage)), one, "model", None, learned)[0]
    assert equal(runs[1][0], runs[2][0])
    assert equal(runs[1][0], runs[3][0])
    assert runs[1][1] == runs[2][1] == runs[3][1]
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "step-6")
    tensors, steps = pool.run("train_routed", str(tmp_path / "1"), settings, "model", None, learned)[0]
    assert equal(tensors, runs[1][0])
    assert steps == runs[1][1]


def test_two_ranks_equal_one_process(llama, tmp_path):
    """A rank on each pair, and one process on both: to the rounding of another order of sums."""
    out, tensors, steps = llama
    alone = Pool(world=1)
    try:
        single, counts = alone.run("train_routed", str(tmp_path), SETTINGS, "model", None, {})[0]
    finally:
        alone.close()
    close(masters(single), masters(tensors))
    assert counts == steps
    losses = [
        [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for folder in (out, tmp_path)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_update_holds_whole_micro_batches_of_one_group():
    groups = [e.group for e in toys.examples(31, groups=3)]
    order = PairOrder(5, groups, 3, 4)
    assert order.updates_per_epoch == 3  # 11, 10, 10 sentences: 3 micro-batches each
    for epoch in (0, 1):
        updates = [order.update(epoch, step) for step in range(3)]
        assert sorted(i for update in updates for i in update) == list(range(31))
        for step, update in enumerate(updates):
            for world in (1, 2, 4):
                accumulation = -(-3 // world)
                parts = [part for rank in range(world) for part in order.share(epoch, step, rank, world, accumulation)]
                assert len(parts) == world * accumulation
                assert sorted(i for part in parts for i in part) == sorted(update)
                assert all(len({groups[i] for i in part}) == 1 for part in parts if part)
    assert order.update(0, 0) != order.update(1, 0)
    assert order.update(0, 0) == PairOrder(5, groups, 3, 4).update(0, 0)
    assert order.update(0, 0) != PairOrder(6, groups, 3, 4).update(0, 0)


@pytest.mark.parametrize(("update", "micro"), [(8, 0), (9, 4)])
def test_an_update_that_does_not_divide_is_refused(update, micro, tmp_path):
    model, routes = toys.model(), toys.routes()
    attach(model, routes, routes.pairs)
    settings = toys.config(str(tmp_path), train_global_batch_size=update, train_micro_batch_size=micro)
    with pytest.raises(UserError, match=f"--train.global-batch-size {update}, --train.micro-batch-size {micro}"):
        train(model, settings.train, Setup(0), toys.examples(9, groups=3), [], tmp_path, {})


def test_groups_by_pairs():
    plain, german, share = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    german.update_group = UpdateGroup(frozenset(["de-en", "en-de"]))
    share.update_group = UpdateGroup(frozenset(["en-fr"]), rate=30.0, decays=False)
    groups = optimizer_groups([share, german, plain])
    assert [group["update_group"].key for group in groups] == ["de-en en-de", "every update", "en-fr x30"]
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]
    activate(groups, {"en-fr"})
    assert [group["active"] for group in groups] == [False, True, True]
    activate(groups, None)
    assert all(group["active"] for group in groups)
    assert EVERY_UPDATE.active({"x-y"})
