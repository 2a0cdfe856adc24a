"""Settings that a model cannot have are refused before anything is scored, as the stage itself would refuse them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys

from slicetune.engine.common.errors import UserError
from slicetune.engine.export.config import ExportConfig
from slicetune.engine.methods.adapter import Adapter, AdapterLora
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.caneft.settings import Caneft, Rcn
from slicetune.engine.methods.counts import Trainable, attention_inputs
from slicetune.engine.methods.given import Given
from slicetune.engine.methods.landermt.settings import Landermt, Layers, Lg, Ls
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.method import Method
from slicetune.engine.models.shapes import ModelShape, from_config
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.run import check
from slicetune.engine.scoring.config import ScoreConfig

LLAMA, BLOOM = from_config(toys.model().config), from_config(toys.bloom().config)
UNITS = LLAMA.layers * LLAMA.intermediate
NOWHERE = replace(
    LLAMA, linears=tuple(x for x in LLAMA.linears if x.name in LLAMA.ffn)
)  # an attention without nn.Linear


@pytest.mark.parametrize(
    ("method", "shape", "groups", "words"),
    [
        (Caneft(neuron_ratio=1e-6), LLAMA, 4, "is no neuron: raise it"),
        (Rcn(neuron_ratio=1.0, task_ratio=None), LLAMA, 4, "is all neurons: lower it"),
        (Caneft(neuron_ratio=0.3), LLAMA, 4, "leaves at most .* wanted: raise --method.task-ratio 0.2 "),
        (Caneft(neuron_ratio=0.3, task_merge="union"), LLAMA, 1, "task-merge union"),
        (Lape(neuron_ratio=1e-6), LLAMA, 4, "wants 0 units, .* raise the ratio"),
        (Lape(neuron_ratio=0.3), LLAMA, 4, r"are active often: lower --method\.percentile 0\.95"),
        (Ls(k=1, epsilon=1.0), LLAMA, 2, r"--method\.epsilon 1\.0 .* leave no unit of 48 a layer that LS trains"),
        (Lg(k=1, epsilon=0.0), BLOOM, 2, r"--method\.epsilon 0\.0 .* that LG trains"),
        (Landermt(k=9), LLAMA, 2, "--method.k 9: the model has 2 layers"),
        (Adapter(), NOWHERE, 1, r"no output projection of the attention .*\(no linear layer\): Adapter needs one of"),
        (LlamaPro(), NOWHERE, 1, "LLaMA Pro needs one of o_proj"),
        (AdapterLora(), NOWHERE, 1, "no output projection"),
    ],
)
def test_what_the_model_cannot_have_is_refused(method: Method, shape: ModelShape, groups: int, words: str):
    with pytest.raises(UserError, match=words):
        method.check(shape, groups)


@pytest.mark.parametrize("method", [Caneft(0.2, neuron_ratio=0.2), Lape(0.1), Layers(k=2), Ls(k=1), Full(), Adapter(4)])
def test_what_it_can_have_passes(method):
    for shape in (LLAMA, BLOOM):
        method.check(shape, 4)


def test_a_union_of_task_filters_may_hold_more():
    Caneft(neuron_ratio=0.3, task_merge="union").check(LLAMA, 4)


def test_lape_never_refuses_early_what_it_could_choose():
    """The most units that can be active often are found by drawing probabilities that no two units share."""
    torch.manual_seed(0)
    for percentile in (0.5, 0.9, 0.95):
        p = torch.rand(3, UNITS, dtype=torch.float64)
        for group in range(3):  # each group has units of its own that are active
            p[group, group::3] += 1
        bar = p.flatten().kthvalue(round(p.numel() * percentile)).values
        often = int((p > bar).any(0).sum())
        Lape(neuron_ratio=often / UNITS, percentile=percentile).check(LLAMA, 3)


def test_a_follower_is_checked_for_what_it_will_be_given():
    lape, unit = Lape(neuron_ratio=1e-6), 3 * LLAMA.hidden
    lape.check(LLAMA, 4, Trainable(5, 5 * unit, 5.0 * unit, 9 * unit))
    with pytest.raises(UserError, match=f"lape wants {UNITS} units"):
        lape.check(LLAMA, 4, Trainable.known(UNITS * unit))


def test_all_tokens_are_read_by_some():
    for method in (Lape(), Landermt(), Layers()):
        with pytest.raises(UserError, match=f"--score.tokens target: {method.title} reads all tokens"):
            RunConfig(method=method, score=ScoreConfig(tokens="target"))
    RunConfig(method=Caneft(), score=ScoreConfig(tokens="target"))


def test_an_adapter_without_biases_is_refused_before_training(tmp_path):
    (tmp_path / "row.json").write_text('[[0, "in", 1]]')
    for method in (Caneft(neuron_ratio=0.1), Given((str(tmp_path / "row.json"),))):
        config = RunConfig(method=method, export=ExportConfig(adapter="ranks"))
        with pytest.raises(UserError, match=r"--export\.adapter ranks: .* has biases in its FFNs"):
            check(config, BLOOM)
    check(RunConfig(method=Caneft(neuron_ratio=0.1), export=ExportConfig(adapter="ranks")), LLAMA)


def test_what_reads_the_attentions_input():
    assert attention_inputs(LLAMA) == ["q_proj", "k_proj", "v_proj"]
    assert attention_inputs(BLOOM) == ["query_key_value"]
