"""When slices are written into their weights: by the forward, by whoever steps, and again where a weight is new."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import toys
from torch import nn

from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.linear import SliceLinear, slice_linears
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.engine.slices.written import Written, leave_to_optimizer

ROWS = torch.tensor([4, 0, 2])


def sliced(bias: bool = False) -> SliceLinear:
    torch.manual_seed(0)
    return SliceLinear(nn.Linear(6, 5, bias=bias), rows=ROWS)


def held(model: nn.Module) -> bool:
    """Whether every weight has its slices' values."""
    tensors = dict(model.named_parameters())
    for name, axis, parameter, index in toys.named_slices(model):
        weight = tensors[name.removeprefix(".")]
        own = weight[index] if axis == "row" else weight[:, index].t()
        if not torch.equal(own, parameter.to(weight.dtype)):
            return False
    return True


def test_any_optimizer_may_step_and_the_forward_sees_it():
    layer = sliced(bias=True)
    optimizer = torch.optim.SGD(layer.trainable(), lr=0.1)
    layer(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert not held(layer)
    layer(torch.ones(2, 6))
    assert held(layer)


def test_left_to_the_optimizer_nothing_is_written_until_it_says_so():
    layer = sliced(bias=True)
    written = leave_to_optimizer(layer)
    with torch.no_grad():
        layer.rows += 1
        layer.bias_rows += 1
    layer(torch.ones(2, 6))
    assert not held(layer)
    written()
    assert held(layer)


def test_our_optimizer_writes_by_itself():
    model = toys.model()
    params = attach(model, toys.neurons())
    leave_to_optimizer(model)
    optimizer = SparseColumnAdamW(params, lr=1e-2)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert held(model)


def test_tensors_that_have_moved_are_written_where_they_are():
    """`.to` makes new indices and may make new storage; an engine may move the parameters into one flat tensor."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    slice_linears(model, rows={"0": [1, 3], "1": [0]})
    written = leave_to_optimizer(model)
    model.to(torch.float64)
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    at = 0
    for p in model.parameters():
        if p.requires_grad:
            p.data = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()
    flat += 1
    assert not held(model)
    written()
    assert held(model)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_backward_writes_again_where_the_weight_is_a_fresh_copy(gathered):
    """As under FSDP, which gathers the frozen values anew: what comes back must be of the trained ones."""
    layer, x = sliced(), torch.ones(2, 6, requires_grad=True)
    frozen = layer.weight.detach().clone()
    with torch.no_grad():
        layer.rows += 1
    y = layer(x)
    want = layer.weight.detach().sum(0).expand(2, 6)
    if gathered:
        layer.weight = nn.Parameter(frozen, requires_grad=False)
    y.sum().backward()
    assert torch.allclose(x.grad, want)
    assert held(layer)


def test_an_undisturbed_backward_writes_nothing(monkeypatch):
    layer = sliced()
    y = layer(torch.ones(2, 6, requires_grad=True))
    monkeypatch.setattr(layer, "refresh", lambda: pytest.fail("written twice"))
    y.sum().backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_slices_of_its_own_weights(how):
    model = nn.Sequential(nn.Linear(6, 5))
    slice_linears(model, rows={"0": [1, 3]})
    before = model[0].weight.detach().clone()
    twin = how(model)
    assert twin[0].rows.slice_of[0] is twin[0].weight
    optimizer = SparseColumnAdamW(twin[0].trainable(), lr=0.1)
    twin[0].rows.grad = torch.ones_like(twin[0].rows)
    optimizer.step()
    assert held(twin)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(twin[0].weight, before)
    Written(twin)()
    assert torch.equal(model[0].weight, before)


def test_a_copy_of_a_model_that_was_left_to_its_optimizer_is_not():
    model = nn.Sequential(nn.Linear(6, 5))
    slice_linears(model, rows={"0": [1, 3]})
    leave_to_optimizer(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].rows += 1
    twin(torch.ones(2, 6))
    assert held(twin)
