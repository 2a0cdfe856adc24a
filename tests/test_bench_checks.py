"""The benchmarks' checks refuse what is wrong, and what they time is what they say."""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch) -> None:
    """The benchmarks' modules can be imported."""
    monkeypatch.syspath_prepend(BENCH)


def test_a_comparison_past_its_time_says_what_it_left_out(monkeypatch):
    import harness

    def pedantic(function, args, rounds, **options):
        for _ in range(rounds):
            function(*args)

    benchmark = SimpleNamespace(pedantic=pedantic, extra_info={})
    comparison = harness.Comparison(benchmark, "suite", "setting")
    comparison.add("in time", lambda: harness.Contender(lambda: None), "ours")
    monkeypatch.setattr(harness, "UNTIL", 0.0)
    comparison.add("late", lambda: pytest.fail("was built"), "ours")
    rows = comparison.measure(60)
    assert rows["in time"]["rounds"] == 1  # the run when it was built is its time
    assert rows["in time"]["seconds"] > 0
    assert rows["late"]["error"] == harness.LATE


@pytest.mark.parametrize("way", ["clock", "events"])
def test_what_comes_before_a_run_comes_before_every_one_and_is_not_timed(monkeypatch, way):
    """The events of a GPU are exchanged for a count of what was done between them."""
    import clock
    import torch

    done = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = len(done)

        def elapsed_time(self, later):
            assert done[self.at : later.at] == ["run"]
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "FLUSH", 16)
    run, prepare = lambda: done.append("run"), lambda: done.append("prepare")
    if way == "clock":
        assert clock.by_clock(run, prepare, 3) >= 0
    else:
        assert clock.by_events(run, prepare) == 1e-3
    assert len(done) >= 6
    assert done == ["prepare", "run"] * (len(done) // 2)


APART = """
import json, os, harness

def patching():
    json.dumps = None
    return harness.Contender(lambda: None, facts={"pid": os.getpid()})

def failing():
    raise ValueError("no such thing")
"""


def test_a_contender_apart_changes_nothing_here(tmp_path, monkeypatch):
    (tmp_path / "patches.py").write_text(APART)
    monkeypatch.syspath_prepend(tmp_path)
    import apart
    import patches

    there = apart.Apart(patches.patching)
    there.run()
    there.run()
    assert there.facts["pid"] != os.getpid()
    assert json.dumps([]) == "[]"
    there.close()
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        apart.Apart(patches.failing)


@functools.cache
def deep():
    """Gradients of slices of 32 narrow layers in bfloat16: by the engine, by plain torch, and in float32."""
    import checks
    import systems
    import torch
    from shapes import Load

    from slicetune.engine.models.shapes import llama

    torch.manual_seed(0)
    load = Load(llama("deep", 32, 64, 160, 4, 2, 256), 3, 16)
    base = systems.random_model(load.model).bfloat16()
    neurons = systems.random_neurons(load.model, 0.1)
    ours = systems.slices(base, systems.batch_of(load), neurons)
    ours.gradients()
    got = [p.grad.clone() for p in ours.params]
    return got, checks.full_gradients(base, ours, neurons), checks.full_gradients(base.float(), ours, neurons)


def test_32_layers_of_bfloat16_meet_the_limit_of_gradients():
    import checks
    import torch

    got, plain, exact = deep()
    checks.judge(got, plain, 32, torch.bfloat16)
    checks.judge(got, exact, 32, torch.bfloat16)
    checks.judge(list(plain.values()), exact, 32, torch.bfloat16)


@pytest.mark.parametrize(
    "fault", ["rows permuted", "two rows exchanged", "scaled by 1.1", "half", "a row is 0", "zero"]
)
def test_a_wrong_gradient_is_refused(fault):
    import checks
    import harness
    import torch

    got, plain, _ = deep()
    wrong = [grad.clone() for grad in got]
    slice_ = wrong[40]
    loud = int(slice_.norm(dim=1).argmax())
    if fault == "permuted":
        slice_.copy_(slice_.roll(1, 0))
    elif fault == "two rows exchanged":
        slice_[[0, loud or 1]] = slice_[[loud or 1, 0]]
    elif fault == "scaled by 1.1":
        slice_.mul_(1.1)
    elif fault == "half":
        slice_.mul_(0.5)
    elif fault == "a row is 0":
        slice_[loud] = 0
    else:
        slice_.zero_()
    with pytest.raises(harness.Wrong, match="gradient of layer"):
        checks.judge(wrong, plain, 32, torch.bfloat16)


def test_a_row_that_is_ten_per_cent_off_is_refused():
    import checks
    import torch

    want = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[int(want.norm(dim=1).argmax())] *= 1.1
    limit = checks.gradient_limit(32, torch.bfloat16)
    assert checks.gradient_fault(want, want, limit) == ""
    assert "one row's error" in checks.gradient_fault(got, want, limit)
    assert "is 1.0500 times" in checks.gradient_fault(want * 1.05, want, limit)


def test_a_step_that_does_not_run_compiled_code_is_refused():
    import checks
    import harness
    import systems
    from shapes import SMOKE_MODEL, Load

    load = Load(SMOKE_MODEL, 2, 8)
    system = systems.floor(systems.random_model(load.model), systems.batch_of(load))
    with pytest.raises(harness.Wrong, match="0 compiled regions ran, for 2 blocks"):
        checks.is_compiled(system)


def test_batches_are_the_engines_own():
    import systems
    from shapes import SMOKE_MODEL, Load

    packed, padded, equal = (systems.batch_of(Load(SMOKE_MODEL, 5, 12, form)) for form in ("packed", "padded", "equal"))
    assert packed.input_ids.shape == (1, 60)
    assert packed.position_ids is not None
    assert sum(end - begin for begin, end in padded.ranges) == 60
    assert padded.input_ids.shape[1] > 12
    assert len({end - begin for begin, end in padded.ranges}) > 1
    assert equal.input_ids.shape == (5, 12)


def test_targets_take_the_worst_form():
    from targets import Missing, worst

    def row(form: str, name: str, seconds: float) -> dict:
        return {"suite": "whole step", "form": form, "tokens": 480, "name": name, "seconds": seconds}

    rows = [row("packed", "a", 2.0), row("packed", "b", 1.0), row("padded", "a", 3.0), row("padded", "b", 1.0)]
    assert worst("a", "b", 480)(rows) == 3
    assert worst("a", "b", 480, most=False)(rows) == 2
    for missing in (worst("a", "b", 8192), worst("a", "c", 480)):
        with pytest.raises(Missing):
            missing(rows)
