"""Slice gradients against the whole weight's gradient in float64 (kernel: test_slices_triton.py)."""

import pytest
import torch

from slicetune.kernels import slice_gradient
from slicetune.kernels.common.dispatch import INTERPRET
from slicetune.kernels.slice_gradient import (
    CONFIGS,
    SMALL,
    chosen,
    column_gradient,
    compact_gradient,
    plan,
    row_gradient,
)

# Inputs are exact in their own type and products are summed in float32, so a half-precision input costs nothing.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


def example(tokens: int, out: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, out, generator=g).to(dtype), torch.randn(tokens, width, generator=g).to(dtype)


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "out", "width", "k"), [(70, 40, 33, 7), (100, 20, 35, 20), (1, 16, 16, 1)])
def test_rows_and_columns_of_the_whole_gradient(tokens, out, width, k, dtype):
    dy, x = example(tokens, out, width, dtype)
    linear = torch.nn.Linear(width, out, bias=False, dtype=torch.float64)
    linear(x.double()).backward(dy.double())
    rows = torch.randperm(out)[:k].sort().values
    columns = torch.randperm(width)[: min(k, width)].sort().values
    result = row_gradient(dy, x, rows)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(result, linear.weight.grad[rows]) < TOLERANCE[dtype]
    assert error(column_gradient(dy, x, columns), linear.weight.grad[:, columns].t()) < TOLERANCE[dtype]
    assert error(compact_gradient(dy[:, rows], x), linear.weight.grad[rows]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_cancel_keep_float32(dtype):
    """Large products that nearly cancel: an accumulator in half precision would lose what is left."""
    dy, x = example(512, 3, 20, dtype)
    x = torch.cat([x, -x])
    dy = torch.cat([dy, dy * (1 + 2**-6)])
    want = dy.double().t() @ x.double()
    assert error(row_gradient(dy, x, torch.arange(3)), want) < 1e-4


def test_nothing_chosen_and_no_tokens():
    dy, x = example(10, 8, 6, torch.bfloat16)
    assert row_gradient(dy, x, torch.empty(0, dtype=torch.int64)).shape == (0, 6)
    none = row_gradient(dy[:0], x[:0], torch.tensor([1, 2]))
    assert none.dtype == torch.float32
    assert torch.equal(none, torch.zeros(2, 6))


def test_unsorted_and_repeated_index_and_strided_inputs():
    dy, x = example(90, 24, 40, torch.float32)
    index = torch.tensor([5, 0, 23, 5])
    want = dy.double()[:, index].t() @ x.double()
    strided = torch.stack([dy, dy], 2)[:, :, 0], x.t().contiguous().t()
    assert error(row_gradient(*strided, index), want) < 1e-6


def test_same_bits_every_time():
    dy, x = example(300, 40, 70, torch.bfloat16)
    index = torch.arange(0, 40, 3)
    first = row_gradient(dy, x, index)
    assert all(torch.equal(row_gradient(dy, x, index), first) for _ in range(3))


def test_every_output_is_written(monkeypatch):
    """Buffers start as NaN: what a program forgets to write shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    dy, x = example(131, 21, 37, torch.float32)
    for index in (torch.arange(21), torch.tensor([20])):
        assert row_gradient(dy, x, index).isfinite().all()


@pytest.mark.skipif(not INTERPRET, reason="splits are the kernel's")
@pytest.mark.parametrize("tokens", [15, 64, 65, 400])
def test_splits_cover_the_tokens(tokens):
    dy, x = example(tokens, 8, 16, torch.float32)
    want = dy.double().t() @ x.double()
    assert slice_gradient.splits_of(400, 1, CONFIGS["interpret"]) > 1
    index_of_rows = torch.arange(8)
    dy = torch.nn.functional.pad(dy, (0, 8))  # the kernel takes columns that are padded to 16
    for config in (CONFIGS["interpret"], SMALL["interpret"]):
        splits = slice_gradient.splits_of(tokens, 1, config)
        for index in (index_of_rows, None):
            assert error(slice_gradient._split_product(dy, x, index, config, splits)[:8], want) < 1e-6


def test_columns_inside_a_buffer():
    """Views of a padded buffer: the first is read where it lies, the second has to be copied; the padding is NaN."""
    dy, x = example(50, 9, 20, torch.float32)
    buffer = torch.full((50, 16), float("nan"))
    buffer[:, :9] = dy
    for columns in (buffer[:, :9], buffer[:, 3:9]):
        assert error(compact_gradient(columns, x), columns.double().t() @ x.double()) < 1e-6


def test_the_chip_is_full():
    """The sizes of an 8B: gate and up as one product, the down rows, at 8,192 tokens and at the authors' 480.

    Every multiprocessor of an H100 (132) has a program, none waits for a second wave.
    """
    for tokens, k, n in ((8192, 288, 4096), (8192, 48, 14336), (480, 288, 4096), (480, 48, 14336)):
        config, splits = chosen("sm_90", tokens, k, n)
        tiles = -(-k // config.slices) * -(-n // config.width)
        assert splits == max(1, min(config.programs // tiles, tokens // (2 * config.tokens)))
        assert 132 <= tiles * splits <= config.programs, (tokens, k, n)
    assert chosen("sm_90", 8192, 512, 14336)[0] is CONFIGS["sm_90"], "much work: the tile that reads least"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op(dtype):
    dy, x = example(12, 8, 6, dtype)
    for index in (torch.tensor([1, 4]), None):
        torch.library.opcheck(slice_gradient._product_op, (dy, x, index))


def test_plan_is_a_rule_of_shapes():
    h100 = CONFIGS["sm_90"]
    assert plan(41, 512, h100) == "gather"
    assert plan(143, 4096, h100) == "compact"
    assert plan(4096, 4096, h100) == "library"


def test_chunks_of_tokens(monkeypatch):
    monkeypatch.setattr(slice_gradient, "_TOKENS", 16)
    dy, x = example(70, 9, 12, torch.float16)
    index = torch.tensor([1, 4, 8])
    want = dy.double()[:, index].t() @ x.double()
    assert error(slice_gradient.selected_product_reference(dy, x, index), want) < 1e-6
