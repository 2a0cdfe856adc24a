"""Training from partitions: what it leaves is bit for bit what ZeRO stage 3 leaves of a model that was whole."""

from __future__ import annotations

import architectures
import pytest
import torch
import toys

from slicetune.engine.methods.adapter import Adapter
from slicetune.engine.methods.base import Full
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.llama_pro import LlamaPro
from slicetune.engine.methods.lora import Dora
from slicetune.engine.models.shapes import from_config

THREE = {"zero_stage": 3, "train_max_steps": 3, "train_save_steps": 2, "train_save_total_limit": 9}
METHODS = (Caneft(), Full(), Dora(rank=2), LlamaPro(blocks=1), Adapter(width=4))
ROUTED = THREE | {"train_global_batch_size": 6, "train_micro_batch_size": 3}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    toys.model().save_pretrained(folder, max_shard_size="20KB")
    return str(folder)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_as_from_a_whole_model_and_resumed(pool, base, tmp_path, method):
    settings = THREE | {"method": method}
    want, before = pool.run("train_method", str(tmp_path / "whole"), settings)[0]
    got, _, size = pool.run("train_shared", base, str(tmp_path / "parts"), settings)[0]
    assert equal(got, want)
    assert size == sum(p.numel() for p in before.values())
    (tmp_path / "again").mkdir()
    (tmp_path / "parts" / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    for file in (tmp_path / "again" / "checkpoints" / "step-3").iterdir():
        file.write_bytes(b"")  # damaged: it goes on from step 2
    assert equal(pool.run("train_shared", base, str(tmp_path / "again"), settings)[0][0], want)


def test_a_block_that_adds_to_its_ffns_output_in_place(pool, tmp_path):
    """Falcon's, where attention and FFN lie side by side."""
    model = architectures.model("falcon, ALiBi")
    model.save_pretrained(tmp_path / "base")
    neurons = architectures.neurons(from_config(model.config))
    settings = THREE | {"method": Caneft()}
    got = pool.run("train_shared", str(tmp_path / "base"), str(tmp_path / "out"), settings, neurons)[0][0]
    assert all(bool(t.isfinite().all()) for t in got.values())
    assert all(bool(t.any()) for name, t in got.items() if name.startswith("exp_avg/"))


@pytest.mark.parametrize(("kind", "units"), [("model", toys.INTERMEDIATE), ("bloom", 4 * toys.HIDDEN)])
def test_routed(pool, tmp_path, kind, units):
    """Units of several owners, the rest of their blocks, learned shares."""
    how = {"attention": True, "share_rate": 30.0, "routes": {"car": "learned"}}
    getattr(toys, kind)().save_pretrained(tmp_path / "base")
    want = pool.run("train_routed", str(tmp_path / "whole"), ROUTED, kind, None, how)[0][0]
    got = pool.run("train_routed_shared", str(tmp_path / "base"), str(tmp_path / "parts"), ROUTED, units, how)[0]
    assert equal(got, want)
