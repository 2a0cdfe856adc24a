"""SparseColumnAdamW where torch.optim.AdamW would stand: schedulers, groups, scaling, compiling, averaging.

Both are driven alike and must have the same bits. What is saved and loaded: test_optimizer_state.py;
what is refused: test_optimizer_refusals.py.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from steps import assert_same_bits, assert_same_model, give_gradients, parameters, run, sliced, train, twins
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from slicetune.engine.slices.optim import SparseColumnAdamW


def in_turn(o):
    return rates.SequentialLR(o, [rates.LinearLR(o, 0.1, total_iters=3), rates.CosineAnnealingLR(o, 6)], [3])


def warm_then_polynomial(o):
    return rates.SequentialLR(o, [rates.ConstantLR(o, 0.5, 2), rates.PolynomialLR(o, 8, 2.0)], milestones=[2])


SCHEDULERS = {
    "lambda": lambda o: rates.LambdaLR(o, lambda t: 0.9**t),
    "multiplicative": lambda o: rates.MultiplicativeLR(o, lambda t: 0.95),
    "step": lambda o: rates.StepLR(o, 3, 0.5),
    "multistep": lambda o: rates.MultiStepLR(o, [2, 5], 0.3),
    "constant": lambda o: rates.ConstantLR(o, 0.3, 4),
    "linear": lambda o: rates.LinearLR(o, 0.2, total_iters=6),
    "exponential": lambda o: rates.ExponentialLR(o, 0.8),
    "polynomial": lambda o: rates.PolynomialLR(o, 8, 2.0),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 7),
    "restarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: rates.CyclicLR(o, 1e-4, 1e-2, 3, cycle_momentum=True),
    "one cycle": lambda o: rates.OneCycleLR(o, 0.05, total_steps=12),
    "plateau": lambda o: rates.ReduceLROnPlateau(o, patience=1),
    "swa": lambda o: SWALR(o, 1e-3, anneal_epochs=4),
    "in turn": in_turn,
    "in turn, polynomial": warm_then_polynomial,
    "chained": lambda o: rates.ChainedScheduler([rates.ConstantLR(o, 0.3, 4), rates.ExponentialLR(o, 0.9)]),
    "chained, step": lambda o: rates.ChainedScheduler([rates.LinearLR(o, 0.5), rates.StepLR(o, 2)]),
}


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, rate):
    """A tensor that holds the rate is filled anew: ours takes the number in it, as torch is given it here."""
    pair = twins(lambda params: [{"params": params[:2]}, {"params": params[2:]}])
    for group in pair[0][1].param_groups:
        group["lr"] = copy.deepcopy(rate)
    made = [SCHEDULERS[name](optimizer) for _, optimizer in pair]
    seen = set()
    for step in range(10):
        for (params, optimizer), scheduler in zip(pair, made, strict=True):
            run(optimizer, params, range(step, step + 1))
            seen.add(float(optimizer.param_groups[1]["lr"]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SequentialLR's own
                scheduler.step(*([1.0] if name == "plateau" else []))
    assert type(pair[0][1].param_groups[0]["lr"]) is type(rate)
    assert len(seen) > 1
    assert_same_bits(*pair)


def test_a_rate_in_a_float32_tensor_is_the_number_that_it_holds():
    """torch computes with the tensor itself, so its last bits are others."""
    rate = torch.tensor(1e-2)
    tensor, theirs = twins(lr=rate)
    number, _ = twins(lr=float(rate))
    for params, optimizer in (tensor, theirs, number):
        run(optimizer, params, range(5))
    assert_same_bits(tensor, number)
    for p, q in zip(tensor[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q)


def test_a_closure_is_called_with_gradients_on_and_its_loss_comes_back():
    pair = twins(dtype=torch.float64)
    for params, optimizer in pair:

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(8)]
        assert losses == sorted(losses, reverse=True)
    assert_same_bits(*pair)


def test_groups_that_come_later_named_parameters_and_empty_ones():
    def groups(params):
        return [{"params": [("first", params[0])]}, {"params": [], "param_names": []}]

    pair = twins(groups, weight_decay=0.1)
    for params, optimizer in pair:
        run(optimizer, params[:1], range(3))
        optimizer.add_param_group({"params": [("third", params[2])], "lr": 3e-3, "foreach": False, "fused": None})
        run(optimizer, [params[0], params[2]], range(3, 6))
        assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == [["first"], [], ["third"]]
    assert_same_bits(*pair)
    model, _ = sliced()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert SparseColumnAdamW(named).param_groups[0]["param_names"] == [name for name, _ in named]


def test_empty_tensors_and_parameters_without_gradients():
    pair = [([*parameters(), nn.Parameter(torch.zeros(0, 4))], kind) for kind in (SparseColumnAdamW, torch.optim.AdamW)]
    pair = [(params, kind(params, lr=1e-2)) for params, kind in pair]
    for params, optimizer in pair:
        for step in range(6):
            give_gradients(step, params)
            params[step % 3].grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            assert all(
                p.grad is None if step % 2 == 0 or i == step % 3 else not p.grad.any() for i, p in enumerate(params)
            )
        optimizer.step()  # zeros move a parameter too; none leave it
    assert_same_bits(*pair)


def test_gradients_of_any_strides():
    pair = twins()
    for params, optimizer in pair:
        for step in range(4):
            give_gradients(step, params)
            params[0].grad = params[0].grad.t().contiguous().t()
            params[2].grad = torch.ones(()).expand(4, 256) * 1.0 if step % 2 else torch.ones(()).expand(4, 256)
            optimizer.step()
    assert_same_bits(*pair)


def test_repr_and_hooks_of_a_step():
    (params, ours), (_, theirs) = twins()
    lines = repr(ours).splitlines()
    assert lines[:3] == ["SparseColumnAdamW (", "Parameter Group 0", "    active: True"]
    assert set(lines[1:]) - {"    active: True"} <= set(repr(theirs).splitlines())
    seen = []
    ours.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("before", params[0].detach().clone())))
    ours.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(("after", params[0].detach().clone())))
    run(ours, params, range(1))
    assert [when for when, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[1][1], params[0])


def test_a_gradient_scaler_skips_the_step_that_overflows():
    pair = twins()
    for params, optimizer in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for step in range(5):
            optimizer.zero_grad()
            scale = scaler.get_scale()
            scaler.scale(sum((p * (math.inf if step == 2 else i + 1)).sum() for i, p in enumerate(params))).backward()
            if step == 3:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, 0.5)
            before = params[0].detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, params[0]) == (step == 2)
            assert (scaler.get_scale() < scale) == (step == 2)
        assert optimizer.state[params[0]]["step"] == 4
    assert_same_bits(*pair)


@pytest.mark.parametrize("settings", [{}, {"moments": "8bit"}], ids=str)
def test_compiled_steps_have_the_same_bits(settings):
    torch._dynamo.reset()
    (model, optimizer), (twin, other) = sliced(**settings), sliced(**settings)

    def whole(x):
        loss = twin(x).square().sum()
        loss.backward()
        other.step()

    compiled, alone = torch.compile(whole, backend="eager"), torch.compile(other.step, backend="eager")
    train(model, optimizer, range(6))
    for step in range(6):
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(step))
        if step < 3:
            compiled(x)
        else:
            twin(x).square().sum().backward()
            alone(closure=None)
        other.zero_grad()
    assert_same_model(model, twin)
    assert [float(entry["step"]) for entry in other.state.values()] == [6.0] * 3


def test_clipping_before_a_step():
    pair = twins()
    for step in range(4):
        norms = []
        for params, optimizer in pair:
            give_gradients(step, params)
            norms.append(nn.utils.clip_grad_norm_(params, 0.3))
            optimizer.step()
        assert norms[0] == norms[1] > 0.3
    assert_same_bits(*pair)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "moving"])
def test_an_averaged_model_has_averaged_slices(average):
    model, optimizer = sliced()
    averaged = AveragedModel(model, multi_avg_fn=average)
    states = []
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        averaged.update_parameters(model)
        states.append(model[0].rows.detach().clone())
    want = states[0]
    for n, state in enumerate(states[1:], 1):
        want = want.lerp(state, 1 / (n + 1) if average is None else 0.1)
    inner = averaged.module[0]
    torch.testing.assert_close(inner.rows, want, rtol=1e-6, atol=1e-7)
    x = torch.ones(2, 40)
    out = averaged(x)
    assert torch.equal(inner.weight[inner.row_index], inner.rows)
    assert inner.rows.slice_of[0] is inner.weight is not model[0].weight
    assert not torch.equal(out, model(x))


@pytest.mark.parametrize("way", ["torch", "hooks"])
def test_optimizers_in_the_backward(way):
    """One optimizer a parameter, each stepping when its gradient is there."""
    (model, optimizer), (twin, _) = sliced(), sliced()
    params = [p for p in twin.parameters() if p.requires_grad]
    if way == "torch":
        _apply_optimizer_in_backward(SparseColumnAdamW, params, {"lr": 1e-2})
    else:
        own = {p: SparseColumnAdamW([p], lr=1e-2) for p in params}

        def step(p):
            own[p].step()
            p.grad = None

        for p in params:
            p.register_post_accumulate_grad_hook(step)
    train(model, optimizer, range(4))
    for step in range(4):
        twin(torch.randn(5, 40, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        assert all(p.grad is None for p in params)
    assert_same_model(model, twin)
