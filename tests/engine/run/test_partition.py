"""--model.partition: when `auto` is on, what a partitioned model takes of a GPU, what the dry run says of it."""

from __future__ import annotations

import re

import pytest

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.settings import of_stage
from slicetune.engine.data.config import DataConfig
from slicetune.engine.methods.base import Base
from slicetune.engine.methods.landermt.settings import Landermt
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.shapes import from_config, known, llama
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.forecast import memory
from slicetune.engine.run.forecast.decoding import decoding, tensor_ranks
from slicetune.engine.run.forecast.estimate import dry_run_text
from slicetune.engine.run.forecast.partition import partition
from slicetune.engine.scoring.passes import counts_bytes
from slicetune.engine.training.config import ZeroConfig

GIGA = 10**9
LLAMA70, LLAMA8, BLOOM = map(known, ("Llama-3.3-70B", "Llama-3.1-8B", "BLOOM-7b1"))
P, BLOCK, HEAD = 70_553_706_496, 855_654_400, 128_256 * 8192


def config(partition: str = "auto", checkpointing: bool = True, **fields) -> RunConfig:
    model = ModelConfig(partition=partition, activation_checkpointing=checkpointing)
    return RunConfig(**{"data": DataConfig(dir="no-such-corpus"), "model": model} | fields)


def parts(rows: list[memory.Part]) -> dict[str, int]:
    return {row.name: row.bytes for row in rows}


ON = "--model.partition on"
MORE = "partition on: decoding with the whole model on each GPU takes {} GB, more than 95% of the GPU's {}.0 GB"


@pytest.mark.parametrize(
    ("shape", "world", "gigabytes", "line"),
    [
        (LLAMA70, 8, 80, MORE.format(153.1, 80)),
        (LLAMA8, 8, 12, MORE.format(21.3, 12)),
        (LLAMA8, 8, 80, "partition off: a GPU of 80.0 GB holds the whole model; decoding takes the most, 21.3 GB"),
        (LLAMA70, 1, 80, "partition off: there is one rank"),
        (LLAMA70, 8, None, f"partition off: no GPU whose memory is known (or set {ON})"),
    ],
)
def test_auto(shape, world, gigabytes, line):
    on = line.startswith("partition on")
    assert partition(config(), shape, world, gigabytes and gigabytes * GIGA) == (on, line)


def test_auto_counts_with_95_percent_of_the_gpu():
    total = memory.device_total(decoding(config("off"), LLAMA8, 8))
    run = config(method=Base())  # it neither scores nor trains
    assert not partition(run, LLAMA8, 8, int(total / 0.95) + 1)[0]
    assert partition(run, LLAMA8, 8, int(total / 0.95) - 1)[0]


def test_what_is_set_is_taken():
    assert partition(config("off"), LLAMA70, 8, 80 * GIGA) == (False, "partition off: as set")
    assert partition(config("on"), LLAMA8, 2, None) == (True, "partition on: as set")
    compiled = RunConfig(model=ModelConfig(compile="blocks"))
    assert partition(compiled, LLAMA70, 8, 80 * GIGA) == (
        False,
        "partition off: --model.compile blocks needs whole weights",
    )
    with pytest.raises(UserError, match=r"--model\.compile blocks: .*use --model\.partition off"):
        RunConfig(model=ModelConfig(compile="blocks", partition="on"))


def test_results_do_not_depend_on_it():
    assert "partition" not in of_stage(ModelConfig(partition="on"), "score")


def test_scoring_partitioned():
    got = parts(memory.scoring(config("on"), LLAMA70, 8))
    whole = parts(memory.scoring(config("off"), LLAMA70, 8))
    assert (got["weights"], whole["weights"]) == (2 * P // 8, 2 * P)
    assert got["gathered weights"] == 2 * (2 * BLOCK + HEAD)
    assert got["histogram counts"] == whole["histogram counts"] == 4 * 256 * 4 * 10 * 65_536
    alone = parts(memory.scoring(config("off"), LLAMA70))
    assert alone["histogram counts"] == 8 * got["histogram counts"]
    assert "bins of a batch" not in alone
    samples = got["bins of a batch"] / LLAMA70.neurons / 2
    assert samples * memory.sample_tokens(config(), 0) >= memory.scoring_tokens(config())
    same = ("sums", "logits", "one FFN's backward", "activations, with checkpointing")
    assert {got[name] == whole[name] for name in same} == {True}


def test_the_rank_that_owns_most_counts():
    shape = llama("six", 6, 2, 3, 1, 1, 10)
    for ranks, most in ((1, 6), (2, 3), (4, 2), (6, 1), (8, 1)):
        owned = max(sum(layer % ranks == rank for layer in range(6)) for rank in range(ranks))
        assert owned == most
        assert counts_bytes(5, shape, ranks) == 4 * 256 * 5 * most * shape.neurons_per_layer


def test_detection_partitioned():
    run = config("on", method=Landermt(), data=DataConfig(dir="no-such-corpus", pairs=("de-en", "en-de")))
    got = parts(memory.scoring(run, LLAMA70, 8))
    assert got["weights"] == 2 * P // 8
    assert "gathered weights" in got
    assert "histogram counts" not in got


def test_training_partitioned_is_stage_3s():
    by_partition = memory.training(config("on"), LLAMA70, 8, 10**8, 512)
    assert by_partition == memory.training(config("off", zero=ZeroConfig(3)), LLAMA70, 8, 10**8, 512)
    text = dry_run_text(config("off", zero=ZeroConfig(3)), LLAMA70, 8, 80 * GIGA)
    assert "each GPU loads the whole model, 141.1 GB: --model.partition on does not" in text


@pytest.mark.parametrize(
    ("shape", "world", "ranks"),
    [(LLAMA70, 8, 8), (LLAMA70, 16, 8), (LLAMA70, 6, 2), (known("Qwen2.5-7B"), 8, 4), (BLOOM, 8, 1), (LLAMA70, 1, 1)],
)
def test_heads_are_not_cut(shape, world, ranks):
    assert tensor_ranks(config("on"), shape, world) == ranks
    assert shape.kv_heads % ranks == shape.heads % ranks == world % ranks == 0


def test_decoding():
    whole, cut = (parts(decoding(config(how), LLAMA70, 16)) for how in ("off", "on"))
    assert (whole["weights"], cut["weights"]) == (2 * P, 2 * (P - HEAD) // 8 + 2 * HEAD)
    assert whole["keys and values"] == 80 * 2 * 8 * 128 * 2 * 32 * (512 + 256) == 8 * cut["keys and values"]
    text = dry_run_text(config("on"), LLAMA70, 16, 40 * GIGA)
    assert "  groups of 8 ranks share a model: as many as divide its heads and a machine's 8 GPUs (assumed)" in text
    small = dry_run_text(config("off"), LLAMA8, 8, 20 * GIGA)
    assert "together             21.261 GB  too large for 20.0 GB, see the end" in small
    bloom = dry_run_text(config("on"), BLOOM, 8, 12 * GIGA)
    assert "each token gathers all weights, which is slow: this model or method cannot be cut by tensors" in bloom
    assert parts(decoding(config("on"), BLOOM, 8))["weights"] == 2 * BLOOM.parameters // 8
    assert "gathered weights" in parts(decoding(config("on", method=Landermt()), LLAMA70, 8))


def test_what_is_cut_is_what_transformers_plan_cuts():
    """The head and every linear layer of a block; the embeddings not in every version, which are counted whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind in ("llama", "qwen2"):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 30}
        made = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=4)
        plan = AutoModelForCausalLM.from_config(made).tp_plan
        assert from_config(made).tensor_parallel
        layers = {name.rpartition(".")[2] for name in plan}
        linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
        assert layers - {"embed_tokens"} == linears


def test_a_tied_head_stays_whole():
    """It is the embedding."""
    tied = known("SmolLM2-135M")
    table = tied.vocab * tied.hidden
    assert parts(decoding(config("on"), tied, 3))["weights"] == 2 * (tied.parameters - table) // 3 + 2 * table


def test_the_dry_run_says_what_auto_is():
    text = dry_run_text(config(), LLAMA70, 8, 80 * GIGA)
    assert text.splitlines()[1].startswith("partition on: ")
    assert re.search(r"^  model\.partition +auto → on$", text, re.M)
    assert "while training 563,716,608 parameters (the expectation), ZeRO stage 3, checkpointing, partitioned" in text
