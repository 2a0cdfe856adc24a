"""Which path a kernel takes: Triton on a GPU, plain torch everywhere else.

    SLICETUNE_KERNELS=auto     Triton on CUDA and ROCm (and under TRITON_INTERPRET=1), torch on a CPU; the default
    SLICETUNE_KERNELS=torch    torch everywhere, to tell a kernel's fault from a model's
    SLICETUNE_KERNELS=triton   Triton or an error, never the slow path unseen

How a backward's chosen columns get into their compact copy, until a GPU has said which is faster:

    SLICETUNE_COLUMNS=kernel   by the backward kernel itself; the default
    SLICETUNE_COLUMNS=select   by index_select after the bare backward

The package imports with torch alone: where Triton is missing, `jit` leaves a kernel as an ordinary function that
nobody calls.
"""

import contextlib
import functools
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack as in_transform
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .errors import UserError

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # a CPU-only or non-Linux install
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(function=None, **options):
        """Stand-in for triton.jit, bare or with options."""
        return function or jit


# Triton reads the variable when a kernel is decorated, so it has to be read here once too.
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"
MODES = ("auto", "triton", "torch")
PLAIN = (Tensor, nn.Parameter)


@functools.cache
def _announce(reason: str) -> None:
    """One loud line a reason and process."""
    print(f"slicetune: kernels run on the slow torch path on this GPU: {reason}", file=sys.stderr, flush=True)


@functools.cache
def _unfit(device_index: int) -> str:
    """Why a GPU cannot run the kernels, or an empty string."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "it is older than sm_80"
    return ""


def use_triton(tensor: Tensor) -> bool:
    """Whether the kernels run for `tensor`; float64 always takes torch, since kernels compute in float32.

    Raises UserError for an unknown SLICETUNE_KERNELS, and where `triton` is demanded and cannot run.
    """
    mode = os.environ.get("SLICETUNE_KERNELS", "auto")
    if mode not in MODES:
        raise UserError(f"SLICETUNE_KERNELS={mode}: choose one of {' '.join(MODES)}")
    if mode == "torch":
        if tensor.is_cuda:
            _announce("SLICETUNE_KERNELS=torch asks for it")
        return False
    if tensor.dtype == torch.float64:
        return False
    if tensor.is_cuda:
        reason = _unfit(tensor.get_device())
    else:
        reason = "" if INTERPRET else f"the tensor is on {tensor.device}"
    if reason and mode == "triton":
        raise UserError(f"SLICETUNE_KERNELS=triton, but {reason}: use auto, or TRITON_INTERPRET=1 for tests")
    if reason and tensor.is_cuda:
        _announce(reason)
    return not reason


def selects_columns() -> bool:
    """Whether columns are copied after a backward kernel. Raises UserError for an unknown SLICETUNE_COLUMNS."""
    way = os.environ.get("SLICETUNE_COLUMNS", "kernel")
    if way not in ("kernel", "select"):
        raise UserError(f"SLICETUNE_COLUMNS={way}: choose one of kernel select")
    return way == "select"


@functools.cache
def _architecture(device_index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device_index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"


def architecture(tensor: Tensor) -> str:
    """The key of a pinned configuration: sm_80, sm_86, sm_90, sm_100, gfx942 …, or `interpret` on a CPU."""
    return _architecture(tensor.get_device()) if tensor.is_cuda else "interpret"


def runs_ptx(tensor: Tensor) -> bool:
    """Whether the tensor's part is NVIDIA's, so that a kernel may hold its assembly."""
    return architecture(tensor).startswith("sm_")


def ceil(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`; triton.cdiv takes ten microseconds of the host for it."""
    return -(-count // size)


HERE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's own GPU: Triton takes the current one, which differs where a model spans several."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else HERE


def runs_now(*tensors: Tensor | None) -> bool:
    """Whether an op's body may be called as an ordinary function: real tensors, no tracing, no autograd to record.

    Going through torch.library costs 50 to 150 µs of the host a call, which is more than a kernel takes for few tokens.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or in_transform() is not None:
        return False
    recorded = torch.is_grad_enabled()
    return all(t is None or (type(t) in PLAIN and not (recorded and t.requires_grad)) for t in tensors)


def upload(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` (numbers, or a tensor on the host) on `device`; the host does not wait for the copy."""
    table = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@dataclass(frozen=True)
class Tile:
    """A pinned configuration of a kernel that walks over rows of tokens."""

    rows: int
    """Tokens of one program."""
    block_rows: int
    """Tokens held in registers at a time."""
    block_cols: int
    warps: int


def pinned(table: dict[str, Tile], tensor: Tensor) -> Tile:
    """The configuration of the tensor's part; `default` for a part that has none of its own."""
    return table.get(architecture(tensor), table["default"])
