"""The path from an op to its launch on an H100, without one: what compiles, how often, what is copied and waited for.

Triton's own JIT compiles for sm_90 with a driver that launches nothing (fake_gpu.py). It changes the whole process, so
programs do it: launches_ops.py compiles every op, launches_steps.py counts over batches and in a step.
"""

import functools
import json
import os
import pathlib
import pkgutil
import runpy
import subprocess
import sys

import pytest

pytest.importorskip("triton")

HERE = pathlib.Path(__file__).parent
MOST_LATER = 4
"""Kernels that may be compiled after a run's first ten batches: each stops it for a second."""
MOST = {"score": 5, "target": 5, "training": 7, "widths": 5}
"""And over 300 batches: one a kernel, several of the slice gradients'. More means that a size of a batch counts."""
MASKS = {
    "transformers.masking_utils._ignore_causal_mask_sdpa _local_scalar_dense",
    "transformers.masking_utils.find_packed_sequence_indices _local_scalar_dense",
}
"""transformers asks the device twice whether a padded batch needs a mask, and once whether a row is packed."""


@functools.cache
def run(program: str, *arguments: str) -> dict:
    """What a program of this folder prints as JSON."""
    left_out = ("TRITON_INTERPRET", "SLICETUNE_KERNELS", "SLICETUNE_COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": ""}
    command = [sys.executable, str(HERE / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_used_of_triton_is_there():
    names = runpy.run_path(str(HERE / "fake_gpu.py"))["USED"]
    assert names
    for name in names:
        pkgutil.resolve_name(name)


def test_every_op_compiles_for_sm_90():
    """At real and odd widths. A launch that does not compile or does not fit raises in the program, which names it."""
    found = run("launches_ops.py")
    wrong = {name: launches for name, (expected, launches) in found["cases"].items() if launches != expected}
    assert not wrong
    assert len(found["cases"]) >= 40
    assert len(found["compiled"]) == len(set(found["compiled"]))


@pytest.mark.parametrize("kind", ["score", "target", "training", "widths"])
def test_few_kernels_are_compiled_after_the_first_batches(kind, record_property):
    found = run("launches_steps.py", kind)
    record_property("first", found["first"])
    record_property("later", len(found["later"]))
    assert found["first"] >= 5  # else nothing was counted
    assert len(found["later"]) <= MOST_LATER, "\n".join(found["later"])
    assert found["first"] + len(found["later"]) <= MOST[kind], "\n".join(found["compiled"])


@pytest.mark.parametrize("kind", ["score", "target"])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_scoring_batch(kind, layers):
    """Sentences fit in one tile: nothing is folded, and the host has counted the tiles."""
    step = run("launches_steps.py", kind)["steps"][str(layers)]
    assert step["launches"] == {
        "_forward_kernel": layers,
        "_backward_kernel": layers,
        "_tap_kernel": layers,
        "_histogram_kernel": 3 * layers,
        "_units_kernel": layers,
    }
    # The lengths and the tiles, whatever the number of layers, and the batch itself.
    assert (step["uploads"], step["batch"]) == (2, 8)
    assert step["ours"] == {"engine.scoring.passes.backpropagate _local_scalar_dense": 1}
    assert set(step["others"]) <= MASKS, step["others"]


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("kind", ["training", "packed"])
def test_a_training_step(kind, layers):
    """One product for gate and up and one for down, one AdamW for all, which also writes the weights."""
    step = run("launches_steps.py", kind)["steps"][str(layers)]
    folds = step["launches"].pop("_fold_kernel", 0)  # of products that are split over the tokens
    assert folds <= 2 * layers
    assert step["launches"] == {
        "_forward_kernel": layers,
        "_backward_kernel": layers,
        "_product_kernel": 2 * layers,
        "adamw_kernel": 1,
    }
    assert (step["uploads"], step["batch"]) == (1, 9)
    assert step["writes"] == 0  # no forward writes slices into its weights
    # The optimizer's count of steps lies on the host: to read it is no wait.
    kept = {f"engine.slices.kept.Kept.{name} tolist": 1 for name in ("fitting", "step")}
    assert step["ours"] == {"engine.training.guard.FiniteWatch.check tolist": 1, **kept}
    assert set(step["others"]) <= MASKS, step["others"]
