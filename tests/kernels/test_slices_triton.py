"""histogram, slice_gradient and adamw as Triton kernels: their tests once more in the interpreter, and their code.

The tests call the public functions, which take torch on a CPU and the kernels under TRITON_INTERPRET=1. That variable
must be set before a kernel module is imported, hence the process of its own.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from slicetune.kernels import compile, histogram, slice_gradient
from slicetune.kernels.adamw import kernel as adamw_kernels


def test_kernels_in_the_interpreter():
    here = pathlib.Path(__file__).parent
    files = [str(here / f"test_{name}.py") for name in ("histogram", "slice_gradient", "adamw")]
    files += [str(here.parent / "engine/slices" / f"test_{name}.py") for name in ("optim", "written")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SLICETUNE_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-12000:] + run.stderr[-4000:]
    assert re.search(r"\b\d+ passed", run.stdout), run.stdout
    assert "skipped" not in run.stdout, run.stdout


def built(module, name: str):
    """A pinned configuration's case and its compiled kernel for sm_90."""
    case = next(case for case in module.aot() if case.name == name and "sm_90" in case.targets)
    return case, compile.build(case, "sm_90")


@pytest.mark.parametrize("name", ["histogram", "bins counted"])
def test_histogram_keeps_a_neuron_on_one_thread(name):
    """Read-modify-write over samples needs no barrier only if no layout changes between the load and the store."""
    _, kernel = built(histogram, name)
    assert "tt.store" in kernel.asm["ttgir"]
    assert "convert_layout" not in kernel.asm["ttgir"]


def test_adamw_moves_128_bits_at_a_time():
    """A thread has 8 elements: two accesses a float32 tensor, one for the rows of the bfloat16 weight."""
    case, _ = built(adamw_kernels, "adamw fp32 into bf16")
    row = compile.inspect(case, "sm_90")
    assert row.loads[128] == 2 * 4  # gradient, parameter and both moments
    assert row.stores[128] == 2 * 3 + 1


@pytest.mark.parametrize(
    ("module", "name", "ones"),
    [
        (histogram, "histogram", ("samples", "neurons")),
        (histogram, "histogram", ("first_bin",)),
        (histogram, "bins counted", ("samples", "neurons")),
        (slice_gradient, "slice_gradient gather bf16", ("n", "stride")),
        (slice_gradient, "slice_gradient compact bf16", ("n",)),
        (slice_gradient, "slice_gradient fold", ("count",)),
    ],
)
def test_sizes_of_one(module, name, ones):
    """Triton compiles a size of 1 as a constant, which the interpreter does not: it has to compile too."""
    case, _ = built(module, name)
    small = dataclasses.replace(
        case,
        signature={name: kind for name, kind in case.signature.items() if name not in ones},
        constexprs={**case.constexprs, **dict.fromkeys(ones, 1)},
        divisible=tuple(name for name in case.divisible if name not in ones),
    )
    assert compile.build(small, "sm_90").asm["cubin"]


def test_adamw_without_a_gradient_scale():
    case, _ = built(adamw_kernels, "adamw fp32")
    signature = {name: kind for name, kind in case.signature.items() if name != "grad_scale"}
    assert compile.build(dataclasses.replace(case, signature=signature), "sm_90").asm["cubin"]
