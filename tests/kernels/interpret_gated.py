"""The Triton kernels of gated, plain and tap against their references in float64.

On a CPU in the interpreter (test_interpreter.py runs it, or TRITON_INTERPRET=1 pytest on this file); on a GPU as it is:
pytest tests/kernels/interpret_gated.py
"""

import pytest
import torch

from slicetune.engine.common.errors import UserError
from slicetune.kernels.common.dispatch import INTERPRET
from slicetune.kernels.common.fold import Segments, host_tiles, tiles_of
from slicetune.kernels.gated.op import gated_backward, gated_forward
from slicetune.kernels.gated.reference import gated_backward_reference, gated_forward_reference
from slicetune.kernels.plain.op import plain_backward, plain_forward
from slicetune.kernels.plain.reference import plain_backward_reference, plain_forward_reference
from slicetune.kernels.tap import tap, tap_reference

DEVICE = "cpu" if INTERPRET else "cuda"
assert INTERPRET or torch.cuda.is_available(), "set TRITON_INTERPRET=1"
pytestmark = pytest.mark.usefixtures("poisoned")

# Relative error of one rounding: fp32 sums of a few dozen terms, fp16 to nearest, bf16 truncated by the interpreter.
ULP = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# (tokens, units, segments): tiles that do not divide, gaps, an empty segment, one sample, one token, exact tiles.
SHAPES = {
    "odd": (37, 72, [[0, 5], [5, 5], [9, 30], [31, 37]]),
    "one sample": (29, 33, [[0, 29]]),
    "one element": (1, 1, [[0, 1]]),
    "exact": (32, 64, [[0, 16], [16, 32]]),
    "nothing scored": (11, 40, []),
}


if DEVICE == "cuda":  # pinned tiles are larger there: several of them a sample, in both directions
    SHAPES["odd"] = (1337, 520, [[0, 5], [5, 5], [9, 1030], [1031, 1337]])


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


def agree(got, want, dtype):
    """Every element within one unit in the last place, or 2e-6 of the largest where a signed sum cancels."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs()
    limit = ULP[dtype] * want.double().abs()
    floor = 2**-19 * (want.double().abs().max() if want.numel() else 0)
    assert bool((error <= limit + floor).all()), f"worst error {error.max()}, limit {(limit + floor).max()}"


def agree_all(got, want, dtype):
    for name, value in vars(want).items():
        field = getattr(got, name)
        if value is None:
            assert field is None, name
        elif name == "active":
            assert field.dtype == torch.int32
            assert torch.equal(field, value)
        elif field.dtype == torch.float32:
            agree(field, value, torch.float32)
        else:
            agree(field, value, dtype)


def inputs(shape, dtype, gain, count=3):
    tokens, units, segments = SHAPES[shape]
    torch.manual_seed(tokens)
    x = [torch.randn(tokens, units).mul_(2).to(dtype) for _ in range(count)]
    c = torch.rand(3, units)
    c[:, ::3] = 0
    c[1, ::2] = 1
    route = torch.randint(0, 3, (tokens,))
    routing = {None: (None, None), "gain": (c, None), "route": (c, route)}[gain]
    index = torch.randperm(units)[: max(1, units // 5)].sort().values
    return x, routing, torch.tensor(segments, dtype=torch.int32).reshape(-1, 2), index


CASES = [
    (torch.float32, "silu", "odd", None),
    (torch.float32, "gelu", "odd", "route"),
    (torch.float16, "gelu_tanh", "odd", None),
    (torch.bfloat16, "silu", "odd", "gain"),
    (torch.bfloat16, "gelu_tanh", "one sample", "route"),
    (torch.float32, "gelu_tanh", "one sample", "gain"),
    (torch.bfloat16, "gelu", "one element", None),
    (torch.float32, "silu", "exact", None),
    (torch.bfloat16, "silu", "nothing scored", None),
    (torch.float32, "relu", "odd", "gain"),
    (torch.float32, "relu2", "odd", None),
]


@pytest.mark.parametrize(("dtype", "activation", "shape", "gain"), CASES)
def test_gated(dtype, activation, shape, gain):
    (dh, gate, up), routing, segments, index = inputs(shape, dtype, gain)
    wide = [x.double() for x in (dh, gate, up)]
    agree(
        gated_forward(gate, up, activation, *routing), gated_forward_reference(*wide[1:], activation, *routing), dtype
    )
    for reduce in ("mean_abs", "abs_sum") if shape == "odd" else ("mean_abs",):
        asked = {"segments": segments, "reduce": reduce}
        if reduce == "mean_abs":
            asked |= {"gate_columns": index, "up_columns": index[:1], "h_columns": index, "emit_h": True}
        got = gated_backward(dh, gate, up, activation, *routing, **asked)
        agree_all(got, gated_backward_reference(*wide, activation, *routing, **asked), dtype)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_plain(case):
    dtype, activation, shape, gain = CASES[case]
    bias = case % 4 > 0
    (dh, pre, b), routing, segments, index = inputs(shape, dtype, gain)
    b = b[0] if bias else None
    wide = dh.double(), pre.double(), activation, b.double() if bias else None
    agree(plain_forward(pre, activation, b, *routing), plain_forward_reference(*wide[1:], *routing), dtype)
    asked = {"segments": segments, "reduce": "abs_sum" if bias else "mean_abs", "h_columns": index, "emit_h": bias}
    asked |= {"pre_columns": index} if bias else {}
    got = plain_backward(dh, pre, activation, b, *routing, **asked)
    agree_all(got, plain_backward_reference(*wide, *routing, **asked), dtype)


@pytest.mark.parametrize("gain", [None, "route"])
def test_without_segments(gain):
    (dh, gate, up), routing, _, index = inputs("odd", torch.float32, gain)
    got = gated_backward(dh, gate, up, "silu", *routing, h_columns=index)
    want = gated_backward_reference(dh.double(), gate.double(), up.double(), "silu", *routing, h_columns=index)
    agree_all(got, want, torch.float32)
    got = plain_backward(dh, gate, "gelu", up[0], *routing)
    agree_all(
        got, plain_backward_reference(dh.double(), gate.double(), "gelu", up[0].double(), *routing), torch.float32
    )


def test_every_unit_and_no_unit_as_columns():
    (dh, gate, up), _, _, _ = inputs("odd", torch.float32, None)
    tokens, units = gate.shape
    every, none = torch.arange(units), torch.arange(0)
    got = gated_backward(dh, gate, up, "silu", gate_columns=every, up_columns=none)
    assert torch.equal(got.dgate_columns, got.dgate)
    assert got.dup_columns.shape == (tokens, 0)


def test_columns_selected_afterwards_are_those_of_the_kernel(monkeypatch):
    (dh, gate, up), _, _, index = inputs("odd", torch.bfloat16, None)
    asked = {"gate_columns": index, "up_columns": index[1:], "h_columns": index[2:]}
    found = []
    for way in ("kernel", "select"):
        monkeypatch.setenv("SLICETUNE_COLUMNS", way)
        found.append(gated_backward(dh.clone(), gate.clone(), up.clone(), "silu", **asked, inplace=True))
    for name in ("dgate_columns", "dup_columns", "h_columns"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
    monkeypatch.setenv("SLICETUNE_COLUMNS", "both")
    with pytest.raises(UserError, match="SLICETUNE_COLUMNS=both: choose one of kernel select"):
        gated_backward(dh, gate, up, "silu", **asked)


def test_in_place_equals_functional():
    (dh, gate, up), routing, segments, index = inputs("odd", torch.bfloat16, "route")
    asked = {"segments": segments, "up_columns": index, "emit_h": True}
    want = gated_backward(dh, gate, up, "silu", *routing, **asked)
    got = gated_backward(dh, gate, up, "silu", *routing, **asked, inplace=True)
    assert (got.dgate is gate, got.dup is up, got.h is dh) == (True, True, True)
    for name, value in vars(want).items():
        assert value is None or torch.equal(value, getattr(got, name)), name


def test_a_sample_alone_has_the_same_bits():
    (dh, gate, up), _, segments, _ = inputs("odd", torch.float32, None)
    packed = gated_backward(dh, gate, up, "silu", segments=segments)
    tapped = tap(gate, dh, segments)
    for sample, (begin, end) in enumerate(segments.tolist()):
        if end > begin:
            own = [x[begin:end] for x in (dh, gate, up)]
            whole = torch.tensor([[0, end - begin]], dtype=torch.int32)
            alone = gated_backward(*own, "silu", segments=whole)
            assert torch.equal(alone.gate_score[0], packed.gate_score[sample])
            assert torch.equal(alone.activation[0], packed.activation[sample])
            assert torch.equal(tap(own[1], own[0], whole)[0], tapped[sample])


@pytest.mark.parametrize(("dtype", "shape"), dict.fromkeys((dtype, shape) for dtype, _, shape, _ in CASES))
def test_tap(dtype, shape):
    (y, dy), _, segments, _ = inputs(shape, dtype, None, count=2)
    for reduce in ("mean_abs", "abs_sum"):
        got, want = tap(y, dy, segments, reduce), tap_reference(y.double(), dy.double(), segments, reduce)
        assert got.dtype == torch.float32
        agree(got, want, torch.float32)


@pytest.mark.parametrize("samples", [0, 1, 2, 70])
def test_tile_table_equals_host_tiles(samples):
    """More regions than a block of the table kernel (141 > 128) and segments of many tiles among the cases."""
    torch.manual_seed(samples)
    tokens, rows = 900, 8
    edges = torch.randint(0, tokens + 1, (2 * samples,)).sort().values
    segments = edges.reshape(-1, 2).to(torch.int32)
    tiles, owned, partials, _ = tiles_of(segments, tokens, rows)
    want = host_tiles(segments, tokens, rows)
    assert [tuple(t) for t in tiles[:, :2].tolist()] == [t[:2] for t in want] + [(tokens, tokens)] * (
        len(tiles) - len(want)
    )
    outside = -(1 << 30)
    counts = [sum(sample == s for *_, sample in want) for s in range(samples)]
    used = 0
    for (_, _, to), (_, _, sample) in zip(tiles.tolist(), want, strict=False):
        if sample < 0:
            assert to == outside
        elif counts[sample] == 1:
            assert to == sample
        else:
            assert to == -1 - used
            used += 1
    assert used <= partials
    for count, (first, last) in zip(counts, owned.tolist(), strict=True):
        assert last - first == (count if count != 1 else -1)
    counted = Segments(segments.tolist(), DEVICE).tiles(tokens, rows)
    assert torch.equal(counted.table, tiles[: len(want)])
    assert torch.equal(counted.owned - counted.owned[:1, :1], owned - owned[:1, :1])
    assert (counted.partials, counted.folds) == (used, any(count != 1 for count in counts))


@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_known_to_the_host_give_the_same_bits(shape):
    (dh, gate, up), _, segments, index = inputs(shape, torch.float32, None)
    known = Segments(segments.tolist(), DEVICE)
    want = gated_backward(dh, gate, up, "silu", segments=segments, gate_columns=index)
    got = gated_backward(dh, gate, up, "silu", segments=known, gate_columns=index)
    for name, value in vars(want).items():
        assert value is None or torch.equal(value, getattr(got, name)), name
    assert torch.equal(tap(gate, dh, known), tap(gate, dh, segments))
