"""Which path runs, what the environment switch does, and that the package imports with torch alone."""

import subprocess
import sys

import pytest
import torch

from slicetune.engine.common.errors import UserError
from slicetune.kernels.common import dispatch
from slicetune.kernels.common.dispatch import Tile, pinned, use_triton


@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_a_cpu_takes_torch(monkeypatch, mode):
    monkeypatch.setenv("SLICETUNE_KERNELS", mode)
    assert not use_triton(torch.ones(1))


def test_demanding_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("SLICETUNE_KERNELS", "triton")
    with pytest.raises(UserError, match=r"cpu.*TRITON_INTERPRET"):
        use_triton(torch.ones(1))
    assert not use_triton(torch.ones(1, dtype=torch.float64)), "float64 has no kernel"


def test_unknown_mode(monkeypatch):
    monkeypatch.setenv("SLICETUNE_KERNELS", "cuda")
    with pytest.raises(UserError, match="SLICETUNE_KERNELS=cuda: choose one of auto triton torch"):
        use_triton(torch.ones(1))


def test_the_interpreter_counts_as_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    assert use_triton(torch.ones(1))
    assert not use_triton(torch.ones(1, dtype=torch.float64))


class Device:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"

    def get_device(self):
        return 0


def test_the_slow_path_on_a_gpu_is_announced_once(monkeypatch, capsys):
    dispatch._announce.cache_clear()
    dispatch._unfit.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert (use_triton(Device()), use_triton(Device())) == (False, False)
    assert capsys.readouterr().err.count("older than sm_80") == 1
    dispatch._unfit.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert use_triton(Device())
    monkeypatch.setenv("SLICETUNE_KERNELS", "torch")
    assert not use_triton(Device())
    assert "slow torch path" in capsys.readouterr().err
    dispatch._unfit.cache_clear()


def test_pinned_falls_back_to_the_default(monkeypatch):
    table = {"default": Tile(1, 1, 1, 1), "gfx942": Tile(2, 2, 2, 2)}
    monkeypatch.setattr(dispatch, "architecture", lambda tensor: "gfx942")
    assert pinned(table, torch.ones(1)) == table["gfx942"]
    monkeypatch.setattr(dispatch, "architecture", lambda tensor: "sm_103")
    assert pinned(table, torch.ones(1)) == table["default"]


ALONE = """
import sys
sys.modules["triton"] = sys.modules["triton.language"] = None
import torch
from slicetune.kernels import adamw, compile, gated, histogram, plain, slice_gradient, tap
x = torch.ones(3, 4, requires_grad=True)
gated.gated_forward(x, x, "silu").sum().backward()
assert x.grad.isfinite().all() and not any(m.startswith(("transformers", "deepspeed")) for m in sys.modules)
"""


def test_the_kernels_import_and_run_with_torch_alone():
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
