"""Names of other libraries that are not public: each is there in the installed version, and does what we need."""

import re
from pathlib import Path

import pytest
import torch
import toys
from torch import distributed as dist
from transformers import Gemma2ForCausalLM, LlamaForCausalLM

from slicetune.engine.common import distributed, private

ENGINE = Path(private.__file__).parents[1]


def test_no_other_file_of_the_engine_names_one():
    """An underscore behind a dot that is not our own object's: only private.py may have it."""
    ours = r"(?:self|cls|super\(\)|stats|detection|entry|index)\._[a-z]"
    for file in ENGINE.rglob("*.py"):
        lines = file.read_text().splitlines()
        found = [line for line in lines if re.search(r"[\w)\]]\._[a-z]", re.sub(ours, "", line.split("#")[0]))]
        assert file.name == "private.py" or not found, (file, found)


def test_torch():
    assert [float(value) for value in private.largest_values([torch.tensor([1.0, -3.0])])] == [3.0]
    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    try:
        private.allow_variants(5000)
        assert (config.recompile_limit, config.accumulated_recompile_limit) == (5000, 5000)
        private.allow_variants(1)
        assert config.recompile_limit == 5000
    finally:
        config.recompile_limit, config.accumulated_recompile_limit = before
    assert hasattr(torch._functorch.config, "ban_recompute_materialized_backward")


def test_process_groups():
    distributed.start(timeout_minutes=3.0)
    other = dist.new_group([0])
    private.same_timeout(torch.device("cpu"))
    backend = other._get_backend(torch.device("cpu"))
    assert backend.options._timeout.total_seconds() == 180


def test_transformers():
    assert private.attention_of(toys.model()) == "sdpa"
    assert private.attentions_of(LlamaForCausalLM) == {"flash": True, "sdpa": True, "any": True}
    assert private.attentions_of(Gemma2ForCausalLM)["flash"]


def test_deepspeed():
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert isinstance(deepspeed.ops.__compatible_ops__, dict)
    one, three = (
        Path(__import__(kind.__module__, fromlist=["x"]).__file__).read_text()
        for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    )
    for name in ("_lazy_init_hp_params_optimizer_state", "single_partition_of_fp32_groups"):
        assert name in one
    for name in ("fp32_partitioned_groups_flat", "sub_group_to_group_id"):
        assert name in three
    with pytest.raises(AssertionError, match="unknown DeepSpeed optimizer"):
        private.flat_partitions(object(), [])


def test_a_parameter_of_no_deepspeed_is_whole():
    assert private.whole_size(torch.nn.Parameter(torch.zeros(2, 3))) == 6
