"""What is loaded into a model with slices is what it has then, in its weights, its slices and its optimizer."""

from __future__ import annotations

import copy
import warnings

import pytest
import saved
import torch
import toys
from torch import nn

from slicetune.engine import ffn, slices
from slicetune.engine.common.errors import UserError
from slicetune.engine.slices.linear import SliceLinear
from slicetune.engine.slices.written import leave_to_optimizer

kinds = pytest.mark.parametrize("kind", ["rows", "columns", "linears"])
optimizers = pytest.mark.parametrize("opt", ["torch", "ours", "sgd"])


def trained(kind: str, opt: str) -> nn.Module:
    model, params = saved.sliced(kind)
    saved.steps(model, saved.optimizer(opt, params))
    return model


@kinds
def test_a_dict_of_an_attached_model_resumes_it(kind):
    model = trained(kind, "torch")
    twin, _ = saved.sliced(kind)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(saved.logits(twin), saved.logits(model))


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_models_dict_sets_the_slices_too(kind, assign):
    """Else the old slices would be written over what was loaded, by the next forward."""
    other = slices.merge(trained(kind, "torch"))
    model, _ = saved.sliced(kind)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert torch.equal(saved.logits(model), saved.logits(other))


@pytest.mark.parametrize("rows", [[5, 9], [17, 3], [3]])
def test_a_checkpoint_of_other_rows_is_refused(rows):
    """Of as many rows it would load cleanly, and put one neuron's weights into another."""
    name = "model.layers.0.mlp.up_proj"
    model, twin = toys.model(), toys.model()
    params = slices.slice_linears(model, rows={name: [3, 17]})
    saved.steps(model, saved.optimizer("torch", params))
    slices.slice_linears(twin, rows={name: rows})
    with pytest.raises(UserError, match=rf"{name}\.rows: the checkpoint trained other rows of this layer"):
        twin.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_trained_on(dtype):
    """In low precision the optimizer's float32 masters would bring the last weights back."""
    model, params = saved.sliced("rows", dtype)
    optimizer = saved.optimizer("ours", params)
    saved.steps(model, optimizer)
    best = copy.deepcopy(model.state_dict())
    saved.steps(model, optimizer)
    model.load_state_dict(best)
    optimizer.param_groups[0] |= {"lr": 1e-9, "weight_decay": 0.0}
    saved.steps(model, optimizer)
    assert all(torch.allclose(tensor, best[name], atol=1e-6) for name, tensor in model.state_dict().items())


def test_an_optimizer_that_trains_nothing_says_so():
    model = toys.model()
    early = saved.optimizer("ours", model.parameters())
    ffn.attach(model, toys.neurons())
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        early.step()
    with warnings.catch_warnings(action="error"):
        early.step()
        params = [p for p in model.parameters() if p.requires_grad]
        saved.steps(model, saved.optimizer("ours", params))


def test_loading_by_assignment_keeps_slices_tied_to_their_weights():
    model, _ = saved.sliced("rows")
    written = leave_to_optimizer(model)
    model.load_state_dict(trained("rows", "torch").state_dict(), assign=True)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in params:
            p += 1
    written()
    for module in model.modules():
        if isinstance(module, SliceLinear):
            assert module.rows.slice_of[0] is module.weight
            assert torch.equal(module.weight[module.row_index], module.rows)


def test_a_dict_of_the_models_own_tensors_loses_no_step():
    model = trained("rows", "torch")
    given = model.state_dict()
    now = copy.deepcopy(given)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 1
            now[name] += 1
    model.load_state_dict(given)
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("ranks", ["all", "first"])
def test_a_plain_models_dict_into_fsdp2(pool, ranks):
    """torch.distributed.checkpoint puts the model's own slices into a dict that has none."""
    for away in pool.run("plain_into_fsdp2", ranks):
        assert away == 0.0
