"""Pinned configurations compiled ahead of time: no spill, limits kept, 128-bit accesses, wgmma.

Every case is compiled for H100/H200 here, and every tiling for MI300X; `make kernels-report` compiles every case for
every part, and its report has to name them all.
"""

import ast
import dataclasses
import functools
import json
import pathlib

import pytest

from slicetune.kernels.common import cases

pytest.importorskip("triton")

from slicetune.kernels import compile as aot
from slicetune.kernels import tap
from slicetune.kernels.common import fold
from slicetune.kernels.common.dispatch import Tile
from slicetune.kernels.gated import kernel as gated_kernels
from slicetune.kernels.plain import kernel as plain_kernels

MOST = "gated_backward gelu_tanh bf16 scores gain columns h"
OWN = [case for module in (gated_kernels, plain_kernels, tap, fold) for case in module.aot()]
CASES = {(case.name, target): case for case in aot.all_cases() for target in case.targets}
ROOT = pathlib.Path(__file__).parents[2]
KERNELS, REPORT = ROOT / "kernels", ROOT / "bench" / "results" / "kernels.json"


def tiling(case):
    """What a pinned configuration is: a kernel, the sizes of its blocks and its warps."""
    sizes = sorted((name, size) for name, size in case.constexprs.items() if isinstance(size, int))
    return case.kernel.__name__, *sizes, *sorted(case.options.items())


def chosen():
    """Every case on sm_90, one case of every tiling on gfx942, and the one with most registers on every part."""
    keys = dict.fromkeys(key for key in CASES if key[1] == "sm_90")
    keys |= dict.fromkeys({tiling(case): key for key, case in CASES.items() if key[1] == "gfx942"}.values())
    return [*(keys | dict.fromkeys((MOST, target) for target in cases.TARGETS))]


@functools.cache
def inspected(name, target):
    return aot.inspect(CASES[name, target], target)


@pytest.mark.parametrize(("name", "target"), chosen())
def test_gates(name, target):
    row = inspected(name, target)
    assert row.faults == []
    assert row.registers > 0
    assert sum(row.loads.values()) > 0


def test_the_report_covers_every_case_on_every_part():
    """All of them were compiled when the report was made; after a change of cases run `make kernels-report`."""
    rows = json.loads(REPORT.read_text())["kernels"]
    assert {(row["name"], row["target"]) for row in rows} == set(CASES)
    assert [row for row in rows if row["faults"]] == []


def test_every_part_is_covered_by_every_kernel():
    assert {target for _, target in CASES} == set(cases.TARGETS)
    for name in {case.name for case in OWN}:
        assert {target for n, target in CASES if n == name} == set(cases.TARGETS)


@pytest.mark.parametrize(
    "case", [c for c in OWN if "sm_90" in c.targets and "ACTIVATION" in c.constexprs], ids=lambda c: c.name
)
def test_tensors_move_128_bits_at_a_time(case):
    """Not one wide access somewhere, but as many as the tensors [T, I] take at 16 bytes a thread."""
    row = inspected(case.name, "sm_90")
    elements = case.constexprs["BLOCK_ROWS"] * case.constexprs["BLOCK_COLS"] // (32 * case.options["num_warps"])
    size = cases.DTYPES[case.signature.get("G", case.signature.get("P"))[1:]]
    reads = sum(name in case.signature for name in ("DH", "G", "U", "P"))
    writes = sum(name in case.signature for name in ("DG", "DU", "H", "DP"))
    assert row.loads[128] >= reads * elements * size // 16
    assert row.stores[128] >= writes * elements * size // 16


@pytest.mark.parametrize("module", [gated_kernels, plain_kernels])
def test_one_token_one_sample_specialise(module):
    """Triton makes integer arguments of 1 constants: the code has to compile with them too."""
    case = next(case for case in module.aot() if "scores gain columns" in case.name)
    ones = {name: 1 for name in case.signature if case.signature[name] == "i32" and name != "width"}
    signature = {name: kind for name, kind in case.signature.items() if name not in ones}
    case = dataclasses.replace(case, signature=signature, constexprs={**case.constexprs, **ones})
    aot.build(case, "sm_90")


def test_faults_are_found():
    """The gates themselves: a tile that spills, a width that breaks vectors, shared memory, a missing dot."""
    case = next(case for case in gated_kernels.aot() if case.name == "gated_backward silu bf16 scores")
    big = dataclasses.replace(case, constexprs={**case.constexprs, "BLOCK_ROWS": 32, "BLOCK_COLS": 256})
    assert any("spills" in fault for fault in aot.inspect(big, "sm_90").faults)
    odd = dataclasses.replace(case, divisible=())
    assert aot.inspect(odd, "sm_90").faults == ["no 128-bit loads", "no 128-bit stores"]
    row = aot.Compiled("x", "sm_86", 32, 0, 101_377, {128: 1}, {128: 1}, 0, [])
    assert aot.faults(case, row) == ["101377 bytes of shared memory, the limit is 101376"]
    row = dataclasses.replace(row, target="sm_90", shared=0)
    assert aot.faults(dataclasses.replace(case, wgmma=True), row) == ["no wgmma"]
    with pytest.raises(AssertionError, match="no parameter GATE"):
        aot.build(dataclasses.replace(case, signature={"GATE": "*bf16"}), "sm_90")


def test_no_function_on_the_device_returns_none():
    """Triton 3.7 compiles that, 3.6 does not, and it is one of the two that are supported."""
    found = set()
    for file in sorted(KERNELS.rglob("*.py")):
        for function in (f for f in ast.walk(ast.parse(file.read_text())) if isinstance(f, ast.FunctionDef)):
            if any(isinstance(d, ast.Name) and d.id == "jit" for d in function.decorator_list):
                found.add(function.name)
                for statement in ast.walk(function):
                    none = isinstance(statement, ast.Return) and getattr(statement.value, "value", ...) is None
                    assert not none, f"{file.name}: {function.name}"
    assert "load_slots" in found


def test_widths_are_read_from_mnemonics():
    sass = {"E.128": 128, "E.64.CONSTANT": 64, "E": 32, "E.U16": 16, "E.S8": 8, "E.ENL2.256": 256, "E.BYPASS.128": 128}
    assert {m: aot._sass_width(m) for m in sass} == sass
    gcn = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short_d16_hi": 16, "ubyte": 8}
    assert {m: aot._gcn_width(m) for m in gcn} == gcn


def test_by_tile_and_markdown():
    a, b = Tile(1, 1, 1, 1), Tile(2, 2, 2, 2)
    table = {"default": a, "gfx942": b, "interpret": Tile(3, 3, 3, 3)}
    assert cases.by_tile(table) == [(a, ("sm_80", "sm_86", "sm_90", "sm_100")), (b, ("gfx942",))]
    case = dataclasses.replace(OWN[0], bytes_moved=6, bytes_minimum=6)
    row = aot.Compiled(case.name, "sm_90", 32, 8, 0, {128: 3, 32: 1}, {128: 2}, 0, ["spills (8)"])
    line = aot.markdown([case], [row]).splitlines()[-1]
    assert f"| {case.name} | 6 | 6 | element of [T, I] | – | – | 32 · 0 · 3/4 · 2/2 **spills (8)** | – | – |" == line
