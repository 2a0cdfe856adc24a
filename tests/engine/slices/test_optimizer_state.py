"""What of SparseColumnAdamW is copied, pickled, saved and loaded, by torch's own ways and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from steps import KINDS, assert_same_bits, assert_same_model, parameters, run, sliced, train, twins
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from slicetune.engine.slices.optim import SparseColumnAdamW


def saved_and_loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": saved_and_loaded}
copies = pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
kinds = pytest.mark.parametrize(("dtype", "settings"), KINDS, ids=str)


@copies
@kinds
@pytest.mark.parametrize("before", [0, 3])
def test_a_copy_goes_on_with_the_same_bits(how, dtype, settings, before):
    params = parameters(dtype)
    optimizer = SparseColumnAdamW([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}], **settings)
    run(optimizer, params, range(before))
    twin = how(optimizer)
    others = [p for group in twin.param_groups for p in group["params"]]
    assert_same_bits((params, optimizer), (others, twin))
    assert (twin.moments, twin.master, twin.seed) == (optimizer.moments, optimizer.master, optimizer.seed)
    run(optimizer, params, range(before, before + 3))
    run(twin, others, range(before, before + 3))
    assert not any(p is q for p, q in zip(params, others, strict=True))
    assert_same_bits((params, optimizer), (others, twin))


@copies
@pytest.mark.parametrize("model_first", [True, False])
def test_a_model_and_its_optimizer_are_copied_together(how, model_first):
    model, optimizer = sliced()
    train(model, optimizer, range(2))
    pair = how((model, optimizer) if model_first else (optimizer, model))
    twin, other = pair if model_first else pair[::-1]
    params = other.param_groups[0]["params"]
    assert all(p is q for p, q in zip(params, (p for p in twin.parameters() if p.requires_grad), strict=True))
    assert twin[0].rows.slice_of[0] is twin[0].weight
    assert twin[2].columns.slice_of[1] is twin[2].column_index
    before = copy.deepcopy(model.state_dict())
    train(twin, other, range(2, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, optimizer, range(2, 5))
    assert_same_model(model, twin)
    assert torch.equal(twin[0].weight[twin[0].row_index], twin[0].rows)  # the step has written it


@copies
def test_a_copy_of_the_optimizer_alone_leaves_the_model_alone(how):
    """Its parameters have no place in a weight, and no file of it holds one."""
    model, optimizer = sliced()
    train(model, optimizer, range(1))
    before = copy.deepcopy(model.state_dict())
    twin = how(optimizer)
    params = twin.param_groups[0]["params"]
    run(twin, params, range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin.write_back()
    assert all(getattr(p, "slice_of", (None,))[0] is None for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_of_torch_adamw_is_gone_on_with(dtype):
    ours, theirs = twins(dtype=dtype, weight_decay=0.1)
    run(theirs[1], theirs[0], range(4))
    with torch.no_grad():
        for p, q in zip(ours[0], theirs[0], strict=True):
            p.copy_(q)
    saved = copy.deepcopy(theirs[1].state_dict())
    saved["state"][0]["step"] = 4
    saved["state"][1]["step"] = torch.tensor([4], dtype=torch.int64)
    ours[1].load_state_dict(saved)
    assert ours[1].param_groups[0]["active"] is True
    assert [ours[1].state[p]["step"].shape for p in ours[0]] == [()] * 4
    for params, optimizer in (ours, theirs):
        run(optimizer, params, range(4, 8))
    assert_same_bits(ours, theirs)
    theirs[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))  # and back: torch takes tensors as they are
    for params, optimizer in (ours, theirs):
        run(optimizer, params, range(8, 10))
    assert_same_bits(ours, theirs)


def test_a_state_of_torch_adam_without_decay_is_one_too():
    params, others = parameters(), parameters()
    adam, optimizer = torch.optim.Adam(others), SparseColumnAdamW(params, weight_decay=0)
    run(adam, others, range(3))
    run(optimizer, params, range(1))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)
    optimizer.load_state_dict(adam.state_dict())
    run(adam, others, range(3, 5))
    run(optimizer, params, range(3, 5))
    assert_same_bits((params, optimizer), (others, adam))


@kinds
def test_what_was_loaded_is_nobody_elses(dtype, settings):
    """Neither the source's tensors nor its rate move with the one that loaded them."""
    params, others = parameters(dtype), parameters(dtype)
    source, target = SparseColumnAdamW(params, torch.tensor(1e-3), **settings), SparseColumnAdamW(others, **settings)
    run(source, params, range(2))
    source.state[params[0]]["note"] = {"seen": [1]}
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    target.load_state_dict(saved)
    target.param_groups[0]["lr"].fill_(1.0)
    target.state[others[0]]["note"]["seen"].append(2)
    run(target, others, range(2, 4))
    assert saved["param_groups"] == kept["param_groups"]
    assert saved["state"][0]["note"] == kept["state"][0]["note"]
    for i, entry in kept["state"].items():
        assert all(torch.equal(value, saved["state"][i][key]) for key, value in entry.items() if key != "note")


def test_hooks_of_saving_and_loading():
    params, others = parameters(), parameters()
    source, target = SparseColumnAdamW(params, lr=1e-2), SparseColumnAdamW(others)
    run(source, params, range(2))
    source.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(made="before"))
    source.register_state_dict_post_hook(lambda o, saved: {**saved, "version": 1})
    saved = source.state_dict()
    assert (saved["version"], saved["param_groups"][0]["made"]) == (1, "before")
    calls = []

    def halves(optimizer, given):
        calls.append("pre")
        state = {i: {**entry, "exp_avg": entry["exp_avg"] / 2} for i, entry in given["state"].items()}
        return {**given, "state": state}

    def seen(optimizer):
        calls.append("post")
        entry = optimizer.state[others[2]]
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(entry["exp_avg"] * 2, saved["state"][2]["exp_avg"])
        assert optimizer.param_groups[0]["lr"] == 1e-2
        entry["exp_avg"].zero_()

    target.register_load_state_dict_pre_hook(halves)
    target.register_load_state_dict_post_hook(seen, prepend=True)
    target.load_state_dict(saved)
    target.load_state_dict(saved)
    assert calls == ["pre", "post"] * 2
    assert not target.state[others[2]]["exp_avg"].any()


def test_states_that_are_not_there_are_made_at_the_next_step():
    """As by torch: what the loaded state lacks is gone, and what is no parameter's stays."""
    params = parameters()
    optimizer = SparseColumnAdamW(params)
    run(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved["state"] = {0: saved["state"][0], 1: {}, "other": 5}
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[0]]["step"] == 2
    assert optimizer.state["other"] == 5
    assert not optimizer.state.get(params[1])
    run(optimizer, params, range(1))
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 1, 1, 1]


@kinds
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_of_torch(dtype, settings, flat, whole):
    """`whole`: the model's state and the optimizer's by one call; else the optimizer's alone."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    (model, optimizer), (twin, other) = sliced(dtype, **settings), sliced(dtype, lr=7.0, **settings)
    train(model, optimizer, range(3))
    if whole:
        values, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        set_state_dict(twin, other, model_state_dict=values, optim_state_dict=state, options=options)
    else:
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        twin.load_state_dict(model.state_dict())
        set_optimizer_state_dict(twin, other, state, options=options)
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same_model(model, twin)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("settings", [{}, {"moments": "8bit"}], ids=str)
def test_checkpoints_of_shards(pool, tmp_path, settings):
    """Of FSDP2 on two ranks, of which each has 8-bit blocks of its own: nothing is lost, and no rank's is another's."""
    for differing in pool.run("resume_shards", str(tmp_path), settings):
        assert differing == []


def test_eight_bits_go_to_as_many_shards_alone(pool, tmp_path):
    pool.run("resume_shards", str(tmp_path), {"moments": "8bit"})
    params = [nn.Parameter(torch.zeros(7, 40))]
    optimizer = SparseColumnAdamW(params, moments="8bit")
    saved = torch.load(tmp_path / "whole.pt")
    entry = saved["state"]["0.rows"]
    assert entry["exp_avg"].shape == (7, 40)
    with pytest.raises(ValueError, match=r"exp_avg_absmax has shape \(2, 1, 1\), not \(2,\); .* as many shards"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entry}})
