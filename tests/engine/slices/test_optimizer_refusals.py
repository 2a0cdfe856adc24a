"""What SparseColumnAdamW refuses of groups and of saved states, in one line, and that nothing has changed then."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from steps import assert_same_bits, give_gradients, parameters, run, twins
from torch import nn

from slicetune.engine.common.errors import UserError
from slicetune.engine.slices.linear import slice_linears
from slicetune.engine.slices.optim import SparseColumnAdamW

REFUSED = [
    ({"lr": math.nan}, "lr nan"),
    ({"lr": torch.ones(2)}, r"lr a tensor of shape \(2,\)"),
    ({"lr": "1e-3"}, "lr 1e-3"),
    ({"betas": (0.9, math.nan)}, "betas"),
    ({"betas": 0.9}, "betas 0.9"),
    ({"betas": (0.9,)}, "betas"),
    ({"betas": (-0.1, 0.9)}, "betas"),
    ({"eps": math.nan}, "eps nan"),
    ({"weight_decay": -1.0}, "weight_decay -1.0"),
    ({"active": 1}, "active 1"),
    ({"maximize": True}, "maximize=True: not done"),
    ({"amsgrad": True}, "amsgrad=True: not done"),
    ({"differentiable": True}, "differentiable=True: not done"),
    ({"capturable": True}, "capturable=True: not done"),
    ({"decoupled_weight_decay": False, "weight_decay": 0.1}, "decoupled_weight_decay=False"),
    ({"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))]}, "complex64: only float32"),
    ({"params": [nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)]}, "int64: only float32"),
]


@pytest.mark.parametrize("shape", [(2, 6), (12,), (5,)])
def test_a_slice_that_was_cut_flat_is_refused(shape):
    """As FSDP1 does, with its parameters and with biases'."""
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5))
    params = slice_linears(layer, rows={"0": [0, 2, 3]})
    at = 1 if shape == (5,) else 0
    params[at].data = torch.zeros(shape)
    params[at].grad = torch.zeros(shape)
    with pytest.raises(UserError, match="as under FSDP1: use FSDP2"):
        SparseColumnAdamW(params).step()


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_groups_are_refused_and_leave_the_optimizer_as_it_was(change, message):
    group = {"params": [nn.Parameter(torch.ones(3))], **change}
    with pytest.raises(UserError, match=message) as error:
        SparseColumnAdamW([dict(group)])
    assert "\n" not in str(error.value)
    (params, ours), twin = twins()
    run(ours, params, range(2))
    with pytest.raises(ValueError, match=message):
        ours.add_param_group(group)
    assert len(ours.param_groups) == 1
    run(ours, params, range(2, 4))
    run(twin[1], twin[0], range(4))
    assert_same_bits((params, ours), twin)


def test_what_is_off_or_only_a_way_to_compute_is_taken():
    off = {"maximize": False, "amsgrad": False, "differentiable": False, "capturable": False}
    ways = {"foreach": True, "fused": True, "decoupled_weight_decay": True, "active": False}
    group = SparseColumnAdamW([{"params": parameters(), **off, **ways}]).param_groups[0]
    assert {**group, **off, **ways} == group
    assert SparseColumnAdamW([{"params": parameters(), "weight_decay": 0, "decoupled_weight_decay": False}])


def state(i: int = 2, **change):
    """A change of parameter i's saved state; None takes a part out."""

    def made(saved: dict) -> dict:
        entry = {**saved["state"][i], **change}
        return {**saved, "state": {**saved["state"], i: {k: v for k, v in entry.items() if v is not None}}}

    return made


def group(**change):
    return lambda saved: {**saved, "param_groups": [{**saved["param_groups"][0], **change}]}


def torch_state(dtype: torch.dtype) -> dict:
    params = parameters(dtype)
    optimizer = torch.optim.AdamW(params)
    run(optimizer, params, range(1))
    return optimizer.state_dict()


BAD = [
    (state(exp_avg_sq=None), "parameter 2: no exp_avg_sq; load"),
    (state(exp_avg=None), "parameter 2: no exp_avg; load"),
    (state(step=None), "parameter 2: no step; load"),
    (state(step=-1), "parameter 2: step is -1; it must be"),
    (state(step=torch.tensor(math.nan)), "step is nan"),
    (state(step=torch.ones(2)), "step is a tensor of shape"),
    (state(exp_avg=torch.zeros(256, 4)), r"parameter 2: exp_avg has shape \(256, 4\), not \(4, 256\); load"),
    (state(3, exp_avg_sq=torch.zeros(1)), r"parameter 3: exp_avg_sq has shape \(1,\), not \(\); load"),
    (state(exp_avg_sq=torch.zeros(4, 256).double()), "exp_avg_sq is torch.float64, not torch.float32; load"),
    (state(exp_avg_sq=3.0), "exp_avg_sq is float, not torch.float32; load"),
    (state(exp_avg=torch.zeros(4, 256).double()), "saved with torch.float64 moments, no master"),
    (state(exp_avg=torch.zeros(4, 256, dtype=torch.int8)), "saved with torch.int8 moments"),
    (state(master=torch.zeros(4, 256)), "saved with torch.float32 moments, a master"),
    (lambda saved: torch_state(torch.bfloat16), "torch.bfloat16 moments, no master.*: train float32"),
    (group(lr=-1.0), "group 0: lr -1.0"),
    (group(betas=(0.9, 1.0)), "group 0: betas"),
    (group(active="no"), "group 0: active 'no'"),
    (group(amsgrad=True), "group 0: amsgrad=True"),
    (group(maximize=True), "group 0: maximize=True"),
    (group(decoupled_weight_decay=False), "group 0: weight_decay 0.01 with decoupled"),
    (group(params=[0, 1, 2]), r"groups with \[3\] parameters, here they have \[4\]"),
    (lambda saved: {**saved, "param_groups": []}, r"groups with \[\] parameters"),
    (lambda saved: {"state": {}}, "no state or no param_groups"),
    (lambda saved: torch.optim.SGD(parameters()).state_dict(), "group 0: no betas"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_refused_state_leaves_everything_as_it_was(change, message):
    (params, ours), twin = twins()
    run(ours, params, range(2))
    bad = change(copy.deepcopy(ours.state_dict()))
    run(ours, params, range(2, 4))
    entries, groups = {p: dict(entry) for p, entry in ours.state.items()}, ours.param_groups
    told = []
    ours.register_load_state_dict_post_hook(told.append)
    with pytest.raises(UserError, match=message) as error:
        ours.load_state_dict(bad)
    assert "\n" not in str(error.value)
    assert not told
    assert ours.param_groups is groups
    assert all(ours.state[p][key] is entries[p][key] for p in params for key in entries[p])
    run(ours, params, range(4, 6))
    run(twin[1], twin[0], range(6))
    assert_same_bits((params, ours), twin)
    ours.register_load_state_dict_pre_hook(lambda optimizer, given: told.append(len(given["state"])))
    ours.load_state_dict(ours.state_dict())  # no hook of the failed load is left to take the state away
    assert told == [4, ours]


@pytest.mark.parametrize(
    ("settings", "missing"), [({}, "master"), ({"moments": "8bit", "master": False}, "exp_avg_absmax")], ids=str
)
def test_parts_of_other_kinds_are_missed_too(settings, missing):
    params = parameters(torch.bfloat16)
    optimizer = SparseColumnAdamW(params, **settings)
    run(optimizer, params, range(1))
    bad = state(**{missing: None})(optimizer.state_dict())
    with pytest.raises(UserError, match="no master" if missing == "master" else f"no {missing}; load"):
        optimizer.load_state_dict(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_parameter_that_cannot_have_a_state_cannot_load_one(dtype):
    p = nn.Parameter(torch.ones(4, 3, dtype=dtype).t())
    saved = {0: {"step": 1, "exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)}}
    optimizer = SparseColumnAdamW([p], master=False)
    with pytest.raises(UserError, match="not contiguous"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
    p.data = p.data.contiguous()
    if dtype == torch.float16:
        with pytest.raises(UserError, match="float16"):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
        give_gradients(0, [p])
        with pytest.raises(UserError, match="float16"):
            optimizer.step()
    assert not optimizer.state
