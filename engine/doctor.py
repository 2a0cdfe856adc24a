"""What a machine can do, whether the kernels compute right on it, and what a bug report needs.

    slicetune doctor [--out runs]      # exit code 1 if a kernel is wrong or something is missing

Prints no name of a user, no path but those named, no environment variable but slicetune's own.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ..kernels.common.dispatch import use_triton
from ..kernels.gated.op import gated_backward, gated_forward
from ..kernels.histogram import BINS, accumulate
from ..kernels.slice_gradient import column_gradient, row_gradient
from ..kernels.tap import tap
from .models.attention import flash_attn, packed_path
from .scoring.cross_entropy import loss_path
from .slices.optim import SparseColumnAdamW

NEEDED = {"torch": "2.11", "safetensors": "0.6"}
"""Library → oldest version; older torch and transformers have known holes in how they load checkpoints."""
ENGINE = {"transformers": "5.17", "deepspeed": "0.19.8", "sacrebleu": "2.5"}
"""The same of what the extra `engine` brings."""
OPTIONAL = ("triton", "flash-attn", "bitsandbytes", "liger-kernel", "peft", "datasets", "tyro", "numpy", "wandb")
VARIABLES = (
    "SLICETUNE_KERNELS",
    "SLICETUNE_DEBUG",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "DS_ACCELERATOR",
)
Finding = tuple[bool, str]
"""Whether all is well, and the line that says so."""


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def libraries() -> list[Finding]:
    """Versions; one that is missing or too old is a fault, an optional one that is missing is said.

    Without any library of the engine this is an installation of kernels, slices and optimizer alone.
    """
    rows, needed = [], NEEDED
    if any(map(version, ENGINE)):
        needed = NEEDED | ENGINE
    else:
        rows.append((True, "kernels, slices and optimizer alone; for the engine: pip install 'slicetune[engine]'"))
    for name, oldest in needed.items():
        have = version(name)
        fine = bool(have) and _numbers(have) >= _numbers(oldest)
        rows.append((fine, f"{name} {have or 'missing'}" + ("" if fine else f": install {name}>={oldest}")))
    return rows + [(True, f"{name} {version(name) or '-'}") for name in OPTIONAL]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())


def capabilities() -> list[Finding]:
    """Devices, and which of the faster paths this machine has."""
    rows = [(True, f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s) a process")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        major, minor = torch.cuda.get_device_capability(index)
        free, whole = torch.cuda.mem_get_info(index)
        rows.append((True, f"GPU {index}: {about.name}, sm_{major}{minor}, {free >> 30} of {whole >> 30} GiB free"))
    if not torch.cuda.is_available():
        rows.append((True, "no GPU: runs are possible on the CPU, with small models (fp32, plain torch kernels)"))
    probe = torch.zeros(1, device=device())
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    backends = {"NCCL": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available()}
    for name, there in {
        "bf16 on a GPU": bf16,
        "Triton kernels": use_triton(probe),
        "flash-attn": flash_attn(device()),
        **backends,
    }.items():
        rows.append((True, f"{name}: {'yes' if there else 'no'}"))
    path = packed_path(device(), torch.bfloat16 if bf16 else torch.float32)
    return [*rows, (True, f"attention over packed rows: {path}"), (True, f"loss: {loss_path(device())}")]


def room(folder: Path) -> list[Finding]:
    """Free disk where runs and models go; under 5 GB is a fault."""
    rows = []
    for name, path in {"--out": folder, "model cache": Path.home() / ".cache"}.items():
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        rows.append(
            (free > 5e9 and writable, f"{name}: {free / 1e9:.0f} GB free{'' if writable else ', not writable'}")
        )
    return rows


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- kernels against plain formulas in float64


def _gated() -> float:
    dh, gate, up = (torch.randn(70, 130, device=device()) for _ in range(3))
    g, u = (t.double().requires_grad_() for t in (gate, up))
    segments = torch.tensor([[0, 30], [30, 70]], dtype=torch.int32, device=device())
    h = F.silu(g) * u
    h.backward(dh.double())
    got = gated_backward(dh, gate, up, "silu", segments=segments)
    scores = torch.stack([(g * g.grad)[a:b].abs().sum(0) for a, b in segments.tolist()])
    pairs = [(gated_forward(gate, up, "silu"), h), (got.dgate, g.grad), (got.dup, u.grad), (got.gate_score, scores)]
    return max(_apart(a, b) for a, b in pairs)


def _tap() -> float:
    y, dy = torch.randn(64, 96, device=device()), torch.randn(64, 96, device=device())
    segments = torch.tensor([[0, 20], [20, 64]], dtype=torch.int32, device=device())
    product = (y.double() * dy.double()).abs()
    return _apart(tap(y, dy, segments), torch.stack([product[:20].sum(0), product[20:].sum(0)]))


def _slice_gradient() -> float:
    dy, x = torch.randn(100, 80, device=device()), torch.randn(100, 64, device=device())
    index = torch.tensor([0, 5, 33, 63], device=device())
    dense = dy.double().T @ x.double()
    rows, columns = row_gradient(dy, x, index), column_gradient(dy, x, index)
    return max(_apart(rows, dense[index]), _apart(columns, dense[:, index].T))


def _histogram() -> float:
    scores = torch.rand(50, 40, device=device()) ** 8
    groups = torch.arange(50, device=device()) % 2
    counts = torch.zeros(2, 40, BINS, dtype=torch.int32, device=device())
    accumulate(scores, groups, counts, -20)
    octave = torch.floor(torch.log2(scores.double()).clamp(-20, 12))
    eighth = torch.floor((scores.double() / 2**octave - 1) * 8)
    expected = torch.zeros_like(counts)
    bins = ((octave + 20) * 8 + eighth).clamp(0, BINS - 1).long()
    for sample, group in enumerate(groups.tolist()):
        expected[group, torch.arange(40, device=device()), bins[sample]] += 1
    return float((counts - expected).abs().sum())


def _adamw() -> float:
    start, gradient = torch.randn(6, 50, device=device()), torch.randn(6, 50, device=device())
    ours, theirs = (torch.nn.Parameter(start.clone().to(t)) for t in (torch.float32, torch.float64))
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for kind, p in ((SparseColumnAdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind([p], **settings)
        for _ in range(3):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
    return _apart(ours, theirs)


def _apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


CHECKS: dict[str, Callable[[], float]] = {
    "gated FFN, forward, backward and scores": _gated,
    "tap": _tap,
    "slice gradients": _slice_gradient,
    "histogram": _histogram,
    "AdamW on slices": _adamw,
}
TOLERANCE = 1e-5


def kernels() -> list[Finding]:
    """Every operation on this device, in float32, against its formula in float64."""
    rows = []
    precise = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        for name, check in CHECKS.items():
            try:
                error = check()
                rows.append((error <= TOLERANCE, f"{name}: off by {error:.1e}"))
            except Exception as error:  # a kernel that fails to compile or to launch: what this command is for
                rows.append((False, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    torch.backends.cuda.matmul.allow_tf32 = precise
    return rows


def report(out: Path) -> tuple[bool, str]:
    """Whether all is well, and the whole report."""
    ours = version("slicetune") or "from its source"
    heading = f"slicetune {ours}, Python {platform.python_version()}, {platform.platform()}"
    parts = {"libraries": libraries(), "machine": capabilities(), "disk": room(out)}
    parts[f"kernels on {device().type}, against their formulas"] = kernels()
    lines = [heading]
    for title, rows in parts.items():
        lines += [title, *(f"  {'ok ' if fine else 'BAD'} {line}" for fine, line in rows)]
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    lines.append(f"variables  {' '.join(given) or '-'}")
    bad = sum(not fine for rows in parts.values() for fine, _ in rows)
    lines.append("all is well" if not bad else f"{bad} fault(s): see the lines with BAD")
    return not bad, "\n".join(lines)


def main(arguments: list[str]) -> int:
    how = {"description": __doc__, "formatter_class": RawDescriptionHelpFormatter}
    parser = ArgumentParser("slicetune doctor", **how)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs will be written")
    given = parser.parse_args(arguments)
    well, text = report(given.out)
    print(text)
    return 0 if well else 1


if __name__ == "__main__":  # python -m slicetune.engine.doctor was the command once; without this it would do nothing
    sys.exit(main(sys.argv[1:]))
