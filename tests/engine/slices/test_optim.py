"""SparseColumnAdamW against torch.optim.AdamW, and what DeepSpeed, routing and resuming ask of it.

tests/kernels/test_slices_triton.py runs these once more where a step is the Triton kernel with its kept tables.
"""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from steps import KINDS, give_gradients, parameters, run, same
from torch import nn

from slicetune.engine.common.errors import UserError
from slicetune.engine.slices import kept
from slicetune.engine.slices.optim import SparseColumnAdamW, clip_factor, write_back
from slicetune.kernels.common.dispatch import INTERPRET


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bits_of_torch_adamw(dtype, decay):
    ours, theirs = parameters(dtype), parameters(dtype)
    groups = [[{"params": p[:2], "lr": 1e-2}, {"params": p[2:], "betas": (0.8, 0.9)}] for p in (ours, theirs)]
    settings = {"lr": 1e-3, "weight_decay": decay, "eps": 1e-6}
    pair = SparseColumnAdamW(groups[0], **settings), torch.optim.AdamW(groups[1], **settings)
    for step in range(40):
        give_gradients(step, ours, theirs)
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + step)  # as a scheduler does
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same(p, q)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert same(pair[0].state[p][key], pair[1].state[q][key])


def test_low_precision_parameters_follow_a_float32_master():
    ours = parameters(torch.bfloat16)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    pair = SparseColumnAdamW(ours, lr=1e-4), torch.optim.AdamW(theirs, lr=1e-4)
    for step in range(30):  # an update is below the last bit of bfloat16, so only a master can collect them
        give_gradients(step, ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.float()
        for optimizer in pair:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same(pair[0].state[p]["master"], q)
        assert same(p, q.bfloat16())


def test_slices_are_written_into_their_weights():
    linear, index = nn.Linear(6, 8), torch.tensor([1, 4, 7])
    before = linear.weight.detach().clone()
    rows, bias = nn.Parameter(linear.weight.detach()[index]), nn.Parameter(linear.bias.detach()[index])
    other = nn.Linear(5, 4).bfloat16()
    columns = nn.Parameter(other.weight.detach()[:, [0, 3]].t().contiguous().float())
    rows.slice_of, bias.slice_of = (linear.weight, index, 0), (linear.bias, index, 0)
    columns.slice_of = (other.weight, torch.tensor([0, 3]), 1)
    run(SparseColumnAdamW([rows, bias, columns], lr=0.1), [rows, bias, columns], range(3))
    assert torch.equal(linear.weight[index], rows)
    assert torch.equal(linear.bias[index], bias)
    assert same(other.weight[:, [0, 3]], columns.t().bfloat16())
    kept = [0, 2, 3, 5, 6]
    assert torch.equal(linear.weight[kept], before[kept])
    assert not torch.equal(linear.weight[index], before[index])
    with torch.no_grad():
        rows.zero_()
    write_back([rows, nn.Parameter(torch.ones(2))])
    assert linear.weight[index].abs().sum() == 0


def test_inactive_group_stays_whole_and_has_state():
    ours, theirs = parameters(), parameters()
    optimizer = SparseColumnAdamW([{"params": ours[:2]}, {"params": ours[2:], "language": "de"}], lr=1e-2)
    first, second = (torch.optim.AdamW(q, lr=1e-2) for q in (theirs[:2], theirs[2:]))
    for step in range(9):
        give_gradients(step, ours, theirs)
        optimizer.param_groups[1]["active"] = step % 3 == 1
        optimizer.step()
        first.step()
        if step % 3 == 1:
            second.step()
        if step == 0:
            assert torch.equal(optimizer.state[ours[2]]["exp_avg"], torch.zeros(4, 256))
            assert optimizer.state[ours[2]]["step"] == 0
    assert all(same(p, q) for p, q in zip(ours, theirs, strict=True))
    assert optimizer.state[ours[2]]["step"] == 3
    assert optimizer.param_groups[1]["language"] == "de"


@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
def test_resumed_run_has_the_bits_of_an_unbroken_one(dtype, options):
    whole, broken = parameters(dtype), parameters(dtype)
    run(SparseColumnAdamW(whole, lr=1e-2, **options), whole, range(8))
    optimizer = SparseColumnAdamW(broken, lr=1e-2, **options)
    run(optimizer, broken, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(broken)
    fresh = SparseColumnAdamW(resumed, lr=7.0, **options)
    fresh.load_state_dict(saved)
    for old, new in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert old.keys() == new.keys()
        assert all(old[k].dtype == new[k].dtype and torch.equal(old[k], new[k]) for k in old)
    kept = copy.deepcopy(saved)
    run(fresh, resumed, range(5, 8))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
    for i, entry in kept["state"].items():  # the loaded dict was copied, not taken over
        assert all(torch.equal(entry[k], saved["state"][i][k]) for k in entry)


@pytest.mark.parametrize("other", [{"moments": "8bit"}, {"master": False}], ids=str)
def test_state_of_another_kind_is_refused(other):
    params = parameters(torch.bfloat16)
    optimizer = SparseColumnAdamW(params)
    run(optimizer, params, range(1))
    with pytest.raises(UserError, match="optimizer state of parameter 0: saved with"):
        SparseColumnAdamW(params, **other).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_factor_is_clip_grad_norm(max_norm):
    ours, theirs = parameters(), parameters()
    pair = SparseColumnAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(5):
        give_gradients(step, ours, theirs)
        factor, norm = clip_factor(ours, max_norm)
        before = [p.grad.clone() for p in ours]
        pair[0].step(grad_scale=factor)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
        assert norm == nn.utils.clip_grad_norm_(theirs, max_norm)
        pair[1].step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_groups_come_and_go_as_under_deepspeed():
    """ZeRO puts a flat float32 partition in a group's place, steps one group at a time and empties the others."""
    ours, theirs = parameters(), parameters()
    optimizer = SparseColumnAdamW([{"params": ours[:2]}, {"params": ours[2:]}], lr=1e-2)
    flat = [nn.Parameter(torch.cat([p.detach().flatten() for p in half])) for half in (ours[:2], ours[2:])]
    twin = torch.optim.AdamW(theirs, lr=1e-2)
    optimizer.create_state(flat[1], steps=0)
    for step in range(4):
        give_gradients(step, ours, theirs)
        twin.step()
        for i, half in enumerate((ours[:2], ours[2:])):
            flat[i].grad = torch.cat([p.grad.flatten() for p in half])
            optimizer.param_groups[i]["params"] = [flat[i]]
            optimizer.param_groups[1 - i]["params"] = []
            optimizer.step()
    want = [torch.cat([p.detach().flatten() for p in half]) for half in (theirs[:2], theirs[2:])]
    assert all(same(p, q) for p, q in zip(flat, want, strict=True))
    optimizer.create_state(flat[0], steps=11)
    assert optimizer.state[flat[0]]["step"] == 11


def test_parameters_without_a_gradient_and_closure():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = SparseColumnAdamW(params)
    params[1].grad = torch.ones(5)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, True, True]
    assert set(optimizer.state) == {params[1]}
    optimizer.create_state()
    assert set(optimizer.state) == set(params)
    assert optimizer.state[params[1]]["step"] == 1


@pytest.mark.parametrize("options", [{"master": False}, {"moments": "8bit"}], ids=str)
def test_random_rounding_repeats_by_seed(options):
    def final(seed: int) -> list[nn.Parameter]:
        params = parameters(torch.bfloat16)
        run(SparseColumnAdamW(params, lr=1e-3, seed=seed, **options), params, range(4))
        return params

    assert all(torch.equal(p, q) for p, q in zip(final(0), final(0), strict=True))
    if "master" in options:
        assert not torch.equal(final(0)[2], final(1)[2])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"moments": "8bit"}),
        (torch.bfloat16, {"master": False}),
        (torch.bfloat16, {"moments": "8bit", "master": False}),
    ],
    ids=str,
)
def test_small_states_learn_as_well(dtype, options):
    """A regression whose updates are far below bfloat16's last bit: the loss comes near that of full state."""
    g = torch.Generator().manual_seed(0)
    x, truth = torch.randn(256, 64, generator=g), torch.randn(64, 16, generator=g)

    def loss_after(dtype, make=SparseColumnAdamW, steps=400, **options) -> float:
        w = nn.Parameter((truth + 0.05 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1))).to(dtype))
        optimizer = make([w], lr=3e-4, weight_decay=0.0, betas=(0.9, 0.99), **options)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (x.to(dtype) @ w - (x @ truth).to(dtype)).float().square().mean()
            loss.backward()
            optimizer.step()
        return float((x @ (w.detach().float() - truth)).square().mean())

    full, start = loss_after(torch.float32), loss_after(torch.float32, steps=0)
    assert full < 0.03 * start
    assert loss_after(dtype, **options) < 1.5 * full
    if dtype == torch.bfloat16:  # the control: rounded to the nearest, the same updates are lost
        assert loss_after(dtype, torch.optim.AdamW) > 0.5 * start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"moments": "4bit"}, "moments '4bit'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        SparseColumnAdamW(parameters(), **settings)


def test_parameters_are_checked():
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(UserError, match="float16"):
        SparseColumnAdamW([half], master=False).create_state()
    with pytest.raises(UserError, match="not contiguous"):
        SparseColumnAdamW([nn.Parameter(torch.ones(3, 4).t())]).create_state()
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse gradient"):
        SparseColumnAdamW(table.parameters()).step()


def test_imports_with_torch_alone():
    """Nothing of Hugging Face, DeepSpeed or Triton is there, and it still steps."""
    script = """
import sys
for name in ("triton", "transformers", "deepspeed", "safetensors", "datasets", "peft", "numpy"):
    sys.modules[name] = None
import torch
from slicetune.engine.optim import SparseColumnAdamW
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
SparseColumnAdamW([p], lr=0.5, weight_decay=0.0).step()
assert torch.allclose(p, torch.full((3,), 0.5)), p
"""
    plain = {**os.environ, "SLICETUNE_KERNELS": "auto", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shards_of_fsdp2():
    """A DTensor's local part is updated, and its state is sharded as it is."""
    script = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from slicetune.engine.optim import SparseColumnAdamW, clip_factor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for options in ({}, {"moments": "8bit"}):
    plain = torch.nn.Parameter(torch.randn(6, 64))
    shard = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    shard.slice_of = (torch.zeros(6, 64), torch.arange(6), 0)
    pair = SparseColumnAdamW([plain], **options), SparseColumnAdamW([shard], **options)
    for _ in range(3):
        plain.grad = torch.randn(6, 64)
        shard.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
        for optimizer, p in zip(pair, (plain, shard)):
            optimizer.step(grad_scale=clip_factor([p], 1.0)[0])
    assert torch.equal(plain, shard.to_local())
    assert isinstance(pair[1].state[shard]["exp_avg"], DTensor)
    try:
        pair[1].load_state_dict(pair[0].state_dict())
    except ValueError as error:
        assert "exp_avg is not sharded as the parameter" in str(error), error
    else:
        raise AssertionError("a whole state was taken for a shard's")
dist.destroy_process_group()
"""
    plain = {**os.environ, "SLICETUNE_KERNELS": "auto", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not INTERPRET, reason="a CPU keeps no tables")
def test_tables_are_kept_until_something_is_another_or_elsewhere(monkeypatch):
    """Each disturbance makes them anew, once, and the steps stay those of torch."""
    ours, theirs = parameters(), parameters()
    optimizer, twin = SparseColumnAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    made, launches = [], kept.Launches
    monkeypatch.setattr(kept, "Launches", lambda *arguments: made.append(1) or launches(*arguments))

    def steps(*numbers: int, without: int | None = None) -> int:
        before = len(made)
        for number in numbers:
            give_gradients(number, ours, theirs)
            if without is not None:
                ours[without].grad = theirs[without].grad = None
            optimizer.step()
            twin.step()
        assert all(same(p, q) for p, q in zip(ours, theirs, strict=True))
        return len(made) - before

    assert steps(0, 1, 2) == 1
    optimizer.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = 1e-3
    assert steps(3) == 0
    assert steps(4, 5, without=1) == 1
    assert optimizer.state[ours[1]]["step"] == 4
    assert steps(6, 7) == 1, "counts of steps are two now"
    state = optimizer.state[ours[0]]
    state["exp_avg"] = state["exp_avg"].clone()
    assert steps(8) == 1
    state["step"].fill_(3)
    twin.state[theirs[0]]["step"].fill_(3)
    assert steps(9, 10) == 1, "a count that is not its row's"
    ours[2].data = ours[2].data.clone()
    assert steps(11) == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(12, 13) == 1


def sliced_weight() -> tuple[torch.Tensor, nn.Parameter]:
    weight, index = torch.zeros(8, 6), torch.tensor([1, 2])
    p = nn.Parameter(weight[index].clone())
    p.slice_of = (weight, index, 0)
    p.grad = torch.ones_like(p)
    return weight, p


def test_a_slice_that_is_given_another_place_is_written_there():
    """Twice between steps: the second tuple may stand at the address of the first."""
    weight, p = sliced_weight()
    optimizer = SparseColumnAdamW([p], lr=0.1)
    optimizer.step()
    for index in ([3, 4], [5, 6]):
        w, _, axis = p.slice_of
        del p.slice_of
        p.slice_of = (w, torch.tensor(index), axis)
    optimizer.step()
    assert torch.equal(weight[[5, 6]], p.detach())


def test_cast_to_bfloat16_after_a_step():
    """No master was made: values are rounded at random from here on, with a key of each step's own."""
    p = nn.Parameter(torch.ones(4, 256))
    optimizer = SparseColumnAdamW([p], lr=0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        p.data, before = p.data.to(dtype), p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (p.float() < before.float()).all()
    assert optimizer.state[p]["step"] == 3


def test_a_sparse_gradient_is_refused_in_any_step():
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = SparseColumnAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(UserError, match="sparse gradient"):
        optimizer.step()


def test_an_inactive_group_that_comes_later_has_its_state():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    optimizer = SparseColumnAdamW([first])
    for _ in range(3):
        first.grad = torch.ones(3)
        optimizer.step()
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [second], "active": False})
    assert torch.equal(optimizer.state[second]["exp_avg"], torch.zeros(5))
    assert torch.equal(second.detach(), torch.ones(5))
