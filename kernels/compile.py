"""Ahead-of-time compilation of every pinned kernel configuration: what can be proven about kernels without a GPU.

    python -m slicetune.kernels.compile            # make kernels-report: bench/results/kernels.json and kernels.md

Compiles for A100, A40, H100/H200, B200 and MI300X and reads registers, spills, shared memory and the width of every
load and store from the machine code. Exits 1 when a gate fails: no spill, shared memory within the part's limit,
128-bit loads and stores in streaming kernels, wgmma where a kernel holds a dot on sm_90.
"""

import argparse
import collections
import json
import pathlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import histogram, slice_gradient, tap
from .adamw import kernel as adamw
from .common import fold
from .common.cases import HIDDEN, INTERMEDIATE, SAMPLES, TARGETS, TOKENS, AotCase
from .common.dispatch import INTERPRET, triton
from .gated import kernel as gated
from .plain import kernel as plain

SHARED_LIMIT = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
PARTS = {"sm_80": "A100", "sm_86": "A40", "sm_90": "H100/H200", "sm_100": "B200", "gfx942": "MI300X"}
MODULES = (gated, plain, tap, fold, histogram, slice_gradient, adamw)


@dataclass
class Compiled:
    """What the machine code of one case on one part says."""

    name: str
    target: str
    registers: int
    spilled: int
    """Bytes of stack (CUDA) or spilled vector registers (ROCm)."""
    shared: int
    loads: dict[int, int]
    """Static load instructions from device memory by width in bits."""
    stores: dict[int, int]
    wgmma: int
    faults: list[str]


def all_cases() -> list[AotCase]:
    """Every module's cases, in a fixed order."""
    cases = []
    for module in MODULES:
        cases += module.aot()
    names = [(case.name, target) for case in cases for target in case.targets]
    assert len(set(names)) == len(names), "two cases share a name and a part"
    return cases


def build(case: AotCase, target: str) -> Any:
    """Triton's compiled kernel of a case for a part; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert not INTERPRET, "TRITON_INTERPRET=1 replaces the compiler"
    parameters = [parameter.name for parameter in case.kernel.params]
    unknown = (case.signature.keys() | case.constexprs.keys()) - set(parameters)
    assert not unknown, f"{case.name}: the kernel has no parameter {' '.join(sorted(unknown))}"
    signature = {name: case.signature.get(name, "constexpr") for name in parameters}
    constexprs = {name: case.constexprs.get(name) for name in parameters if name not in case.signature}
    if "FAST" in constexprs:
        constexprs["FAST"] = target.startswith("sm_")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(parameters)
        if signature[name].startswith("*") or name in case.divisible
    }
    part = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(ASTSource(case.kernel, signature, constexprs, attributes), target=part, options=case.options)


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def _sass_width(mnemonic: str) -> int:
    """Bits a thread of "E.128", "E.64", "E.U16", "E" …"""
    found = re.search(r"\b(256|128|64)\b|[US](16|8)\b", mnemonic)
    return int(found.group(1) or found.group(2)) if found else 32


def _gcn_width(suffix: str) -> int:
    """Bits a thread of "dwordx4", "dword", "ushort", "short_d16_hi" …"""
    words = re.search(r"dword(?:x(\d))?", suffix)
    if words:
        return 32 * int(words.group(1) or 1)
    return 8 if "byte" in suffix else 16


def _count(widths: list[int]) -> dict[int, int]:
    return dict(sorted(collections.Counter(widths).items(), reverse=True))


def inspect(case: AotCase, target: str) -> Compiled:
    """Compile a case for a part and read its machine code."""
    kernel = build(case, target)
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{k}:\s+(\d+)", code).group(1)) for k in ("count", "spill_count"))
        access = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", code)
        loads = [_gcn_width(suffix) for kind, suffix in access if kind == "load"]
        stores = [_gcn_width(suffix) for kind, suffix in access if kind == "store"]
        wgmma = 0
    else:
        usage = _cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
        code = _cuobjdump(kernel.asm["cubin"], "-sass")
        registers, spilled = (int(re.search(rf"\b{k}:(\d+)", usage).group(1)) for k in ("REG", "STACK"))
        loads = [_sass_width(m) for m in re.findall(r"\b(?:LDG|LDGSTS)\.([\w.]+)", code)]
        stores = [_sass_width(m) for m in re.findall(r"\bSTG\.([\w.]+)", code)]
        wgmma = len(re.findall(r"\bHGMMA\b", code))
    shared = kernel.metadata.shared
    row = Compiled(case.name, target, registers, spilled, shared, _count(loads), _count(stores), wgmma, [])
    row.faults = faults(case, row)
    return row


def faults(case: AotCase, row: Compiled) -> list[str]:
    """The gates that a compiled case fails, in words."""
    found = []
    if row.spilled:
        found.append(f"spills ({row.spilled})")
    if row.shared > SHARED_LIMIT[row.target]:
        found.append(f"{row.shared} bytes of shared memory, the limit is {SHARED_LIMIT[row.target]}")
    if case.streaming and max(row.loads, default=0) < 128:
        found.append("no 128-bit loads")
    if case.streaming and not case.reduces and max(row.stores, default=0) < 128:
        found.append("no 128-bit stores")
    if case.wgmma and row.target == "sm_90" and not row.wgmma:
        found.append("no wgmma")
    return found


def _share(counts: dict[int, int]) -> str:
    """ "6/9": of nine static accesses six are 128 bits or wider."""
    return f"{sum(n for width, n in counts.items() if width >= 128)}/{sum(counts.values())}"


def markdown(cases: list[AotCase], rows: list[Compiled]) -> str:
    """The table for people: a line a case, a column a part."""
    found = {(row.name, row.target): row for row in rows}
    heads = ["kernel", "bytes", "minimum", "per", *(f"{target} ({PARTS[target]})" for target in TARGETS)]
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        "Generated by `make kernels-report` on a machine without a GPU: no number here is a timing. A cell reads",
        "registers a thread · bytes of shared memory · 128-bit loads/all loads · 128-bit stores/all stores (static",
        "instructions, scalar ones of tables and bounds included). Bytes are those of device memory per element for",
        f"{TOKENS} tokens in {SAMPLES} sentences at Llama-3.1-8B's FFN ({HIDDEN} × {INTERMEDIATE}).",
        f"Compiled with triton {triton.__version__}, torch {torch.__version__}.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
    ]
    for name in dict.fromkeys(case.name for case in cases):
        case = next(case for case in cases if case.name == name)
        cells = [name, f"{case.bytes_moved:.3g}", f"{case.bytes_minimum:.3g}", case.element]
        for target in TARGETS:
            row = found.get((name, target))
            text = f"{row.registers} · {row.shared} · {_share(row.loads)} · {_share(row.stores)}" if row else "–"
            cells.append(text + ("".join(f" **{fault}**" for fault in row.faults) if row else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compile everything, write the two reports, return 1 when a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench/results"))
    out = parser.parse_args().out
    cases, rows = all_cases(), []
    for case in cases:
        rows += [inspect(case, target) for target in case.targets]
        worst = [f"{row.target}: {fault}" for row in rows[-len(case.targets) :] for fault in row.faults]
        print(f"{case.name:60} {'; '.join(worst) or 'ok'}", flush=True)
    bytes_of = {case.name: (case.bytes_moved, case.bytes_minimum, case.element) for case in cases}
    keys = "bytes_moved", "bytes_minimum", "element"
    table = [{**asdict(row), **dict(zip(keys, bytes_of[row.name], strict=True))} for row in rows]
    provenance = {"triton": triton.__version__, "torch": torch.__version__, "made_by": "make kernels-report"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps({**provenance, "kernels": table}, indent=1) + "\n")
    (out / "kernels.md").write_text(markdown(cases, rows))
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
