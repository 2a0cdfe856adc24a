"""AdamW over the compact slices of a whole model in one launch, with the scatter into the weights they belong to.

    adamw_(slices, grad_scale)      # one step
    launches = Launches(slices)     # the same for an optimizer that steps again and again: its tables are kept

A table of pointers (one row a slice) and a list of tiles (which slice, which 1024 elements of it) lie on the device; a
program takes one tile. Slices of one storage layout share a launch: a Llama in bfloat16 has one. The formula, the
8-bit moments and the random bits are those of `adamw_reference`, operation by operation.
"""

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import or_
from struct import Struct

import torch
from torch import Tensor

from ..common.dispatch import architecture, on_device, upload, use_triton
from .kernel import FIELDS, HYPER, TILE, adamw_kernel, constants, warps_of, write_kernel
from .reference import BLOCK, Slice, adamw_reference, scatter

WRITES = "PARAM", "WEIGHT", "ALIGNED", "WHOLE", "ROWS", "BLOCK", "FIELDS", "num_warps"
"""What of a layout's constants `write_kernel` takes."""
_FLOATS, _BITS = Struct(f"{HYPER}f"), Struct(f"{HYPER // 2}q")


@torch.no_grad()
def adamw_(slices: list[Slice], grad_scale: Tensor | None = None) -> None:
    """One AdamW step (decoupled weight decay) over all slices, in place, and the new values into their weights.

    grad_scale: one-element tensor on the slices' device that multiplies every gradient (loss scale, clip factor).
    """
    slices = [s for s in slices if s.param.numel()]
    fast = [s for s in slices if use_triton(s.param)]
    adamw_reference([s for s in slices if not use_triton(s.param)], grad_scale)
    if fast:
        rates = [hyper(s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.step) for s in fast]
        Launches(fast, range(len(fast))).step([s.grad for s in fast], rates, [s.key for s in fast], grad_scale)


def hyper(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> list[float]:
    """What the kernel takes of the settings at a step, which counts from 1."""
    size, correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, size, correction, eps, 0.0]


class Launches:
    """The launches of a list of slices: pointers and tiles stay on the device, gradients and rates come with a step.

    rates: for each slice the number of its row in what `step` is given. A slice's parameter, moments, weight and the
    type of its gradient must stay where and what they are.
    """

    def __init__(self, slices: list[Slice], rates: Sequence[int]) -> None:
        layouts: dict[tuple, list[int]] = {}
        rows = [_row(s, rate) for s, rate in zip(slices, rates, strict=True)]
        for i, s in enumerate(slices):
            layouts.setdefault(_layout(s, rows[i]), []).append(i)
        self.launches = [
            _Launch(key, [slices[i] for i in own], [rows[i] for i in own], own) for key, own in layouts.items()
        ]

    def step(
        self, grads: Sequence[Tensor], rates: list[list[float]], keys: Sequence[int], grad_scale: Tensor | None
    ) -> None:
        """One step. grads, keys: one a slice, in the order of `slices`; keys are read where values are rounded."""
        pointers = [*map(Tensor.data_ptr, grads)]
        for launch in self.launches:
            own = pointers if len(self.launches) == 1 else [pointers[i] for i in launch.members]
            launch.step(own, rates, keys, grad_scale)


class _Launch:
    """One launch: slices of one layout."""

    def __init__(self, layout: tuple, slices: list[Slice], rows: list[list[int]], members: list[int]) -> None:
        self.device, *self.options = layout
        self.members = members
        self.first, self.random = slices[0].param, self.options[4] or self.options[5]
        self.tiles = _tiles(tuple(row[8] for row in rows), self.device)
        self.table = upload(rows, torch.int64, self.device)
        self.warps = warps_of(architecture(self.first))
        self.constants = {aligned: constants(*_aligned(self.options, aligned)) for aligned in (False, True)}
        # A graph that saved these and is still to run backward must raise, as after torch's own in-place operations.
        self.written = [t for s in slices for t in (s.param, s.weight) if t is not None]

    def step(self, grads: list[int], rates: list[list[float]], keys: Sequence[int], scale: Tensor | None) -> None:
        aligned = self.options[6] and reduce(or_, grads) % 16 == 0
        count = len(grads)
        numbers = grads + [_signed(keys[i]) for i in self.members] if self.random else [*grads]
        numbers += [0] * (len(numbers) % 2)  # the rates begin at 16 bytes
        both = upload(
            numbers + [pair for rate in rates for pair in _BITS.unpack(_FLOATS.pack(*rate))], torch.int64, self.device
        )
        scale = None if scale is None else scale.to(self.device, torch.float32)
        with on_device(self.first):
            adamw_kernel[(self.tiles.shape[0],)](
                self.table, self.tiles, both, both[len(numbers) :].view(torch.float32), scale, count,
                **self.constants[aligned], num_warps=self.warps,
            )  # fmt: skip
        torch.autograd.graph.increment_version(self.written)


class Writes:
    """Slices into the weights that they are of, in one launch a layout; the tables are kept.

    slices: (param, weight, index, axis) each, as in `Slice`. Call the object after the parameters have changed. No
    version counter rises: a graph of the values before is none that anyone runs backward.
    """

    def __init__(self, slices: Sequence[tuple[Tensor, Tensor, Tensor, int]]) -> None:
        self.slices = list(slices)
        self.tensors = [t for param, weight, *_ in self.slices for t in (param, weight)]
        self.at: list[int] = []
        self.launches: list[tuple] = []

    @torch.no_grad()
    def __call__(self) -> None:
        if not self.slices or not use_triton(self.slices[0][0]):
            for param, weight, index, axis in self.slices:
                scatter(param.data, weight.data, index, axis)  # wherever they lie now
            return
        at = [*map(Tensor.data_ptr, self.tensors)]
        if at != self.at:
            self.at, self.launches = at, self._tables()
        for first, table, tiles, options in self.launches:
            with on_device(first):
                write_kernel[(tiles.shape[0],)](table, tiles, **options)

    def _tables(self) -> list[tuple]:
        layouts: dict[tuple, list[tuple[Tensor, list[int]]]] = {}
        for param, weight, index, axis in self.slices:
            if param.numel():
                nothing = param.new_empty(0)
                s = Slice(param, param, nothing, nothing, 1, 0, 0, 0, 0, 0, weight=weight, index=index, axis=axis)
                row = _row(s, 0)
                layouts.setdefault(_layout(s, row), []).append((param, row))
        found = []
        for layout, members in layouts.items():
            rows = [row for _, row in members]
            every = constants(*layout[1:]) | {"num_warps": warps_of(architecture(members[0][0]))}
            options = {name: every[name] for name in WRITES}
            tiles = _tiles(tuple(row[8] for row in rows), layout[0])
            found.append((members[0][0], upload(rows, torch.int64, layout[0]), tiles, options))
        return found


def _row(s: Slice, rate: int) -> list[int]:
    """One row of the table (adamw_kernels.FIELDS); zero where a slice has no such tensor."""
    numel = s.param.numel()
    assert numel < 2**31 - TILE, f"{numel} elements in one parameter: the kernel counts in 32 bits"
    row = [0] * FIELDS
    row[:3] = s.param.data_ptr(), s.exp_avg.data_ptr(), s.exp_avg_sq.data_ptr()
    row[8], row[9], row[11], row[12] = numel, numel, s.axis, rate
    if s.master is not None:
        row[3] = s.master.data_ptr()
    if s.exp_avg_absmax is not None:
        row[4], row[5] = s.exp_avg_absmax.data_ptr(), s.exp_avg_sq_absmax.data_ptr()
    if s.weight is not None:
        assert s.weight.stride(-1) == 1, f"weight of strides {s.weight.stride()}: elements of a row must be neighbours"
        assert s.weight.device == s.index.device == s.param.device, "a slice and its weight are on different devices"
        # A bias is a weight whose rows have one element.
        row[6], row[7], row[9] = s.weight.data_ptr(), s.index.data_ptr(), numel // s.param.shape[0]
        row[10] = s.weight.stride(0)
    return row


def _layout(s: Slice, row: list[int]) -> tuple:
    """What must be equal in one launch: device, types, options, and how many neighbouring elements lie together.

    aligned: 16 elements always do, so that accesses are vectors; whole: a block of 256 lies in one row or column.
    """
    aligned = all(x % 16 == 0 for x in (*row[:4], *row[6:7], *row[8:11]))
    weight = None if s.weight is None else s.weight.dtype
    whole = aligned and s.weight is not None and row[9] % BLOCK == 0
    kinds = s.param.device, s.param.dtype, s.grad.dtype, weight
    return *kinds, s.master is not None, s.exp_avg_absmax is not None, s.rounds, aligned, whole


def _aligned(options: list, aligned: bool) -> list:
    """A layout for a step whose gradients are aligned, or not."""
    return [*options[:6], options[6] and aligned, options[7] and aligned]


@lru_cache(maxsize=64)
def _tiles(numels: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [programs, 2]: slice and tile number of each program."""
    counts = torch.tensor([-(-n // TILE) for n in numels])
    owner = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = torch.cumsum(counts, 0) - counts
    return torch.stack([owner, torch.arange(owner.numel()) - first[owner]], 1).to(torch.int32).to(device)


def _signed(key: int) -> int:
    """64 bits as the int64 that has them."""
    return key - (key >> 63 << 64)
