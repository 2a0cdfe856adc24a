"""Every kernel compiled for the GPU at hand against its float64 reference; on a CPU the same checks of the torch path.

    python bench/run.py gpu         # runs this first; or: python -m pytest bench/gpu_kernels.py

Odd shapes, gaps, an empty selection, every unit, one sample, routing, in place, fp32, fp16, bf16, fp8; a step of the
engine with kernels against one without; repeated runs to the bit.
"""

from __future__ import annotations

import copy

import pytest
import torch
from shapes import DEVICE, GPU
from torch import Tensor, nn

from slicetune.engine.models import sites as sites_module
from slicetune.engine.models.quantised import float8
from slicetune.engine.scoring import passes as scoring
from slicetune.engine.scoring.config import ScoreConfig
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.optim import SparseColumnAdamW
from slicetune.kernels.common.dispatch import use_triton
from slicetune.kernels.gated.op import gated_backward, gated_forward
from slicetune.kernels.gated.reference import gated_backward_reference, gated_forward_reference
from slicetune.kernels.histogram import BINS, accumulate, accumulate_reference
from slicetune.kernels.plain.op import plain_backward, plain_forward
from slicetune.kernels.plain.reference import plain_backward_reference, plain_forward_reference
from slicetune.kernels.slice_gradient import column_gradient, row_gradient
from slicetune.kernels.tap import tap, tap_reference

torch.backends.cuda.matmul.allow_tf32 = False  # some images turn it on, and float32 is held against float64 here
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SUMS = 5e-6
"""Sums are accumulated in float32 whatever the inputs are."""
SHAPES = {
    "odd": (1037, 1000, [[0, 5], [5, 5], [9, 530], [531, 1037]]),
    "wide": (300, 14336, [[0, 128], [128, 300]]),
    "one sample": (129, 4096, [[0, 129]]),
    "one element": (1, 1, [[0, 1]]),
    "nothing scored": (64, 272, []),
}


def test_kernels_run_as_kernels_on_a_gpu():
    assert use_triton(torch.empty(1, device=DEVICE)) == GPU


def agree(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300)
    assert float(error) <= limit, f"relative error {float(error):.3g}"


def inputs(shape: str, dtype: torch.dtype, routed: bool):
    tokens, units, segments = SHAPES[shape]
    torch.manual_seed(tokens)
    x = [torch.randn(tokens, units, device=DEVICE).mul_(2).to(dtype) for _ in range(3)]
    gain = torch.rand(3, units, device=DEVICE)
    gain[:, ::3] = 0
    routing = (gain, torch.randint(0, 3, (tokens,), device=DEVICE)) if routed else (None, None)
    index = torch.randperm(units, device=DEVICE)[: max(1, units // 5)].sort().values
    return x, routing, torch.tensor(segments, dtype=torch.int32, device=DEVICE).reshape(-1, 2), index


def agree_all(got, want, dtype: torch.dtype) -> None:
    for name, value in vars(want).items():
        field = getattr(got, name)
        if value is None:
            assert field is None, name
        elif name == "active":
            assert torch.equal(field, value)
        elif value.numel():
            agree(field, value, SUMS if field.dtype == torch.float32 else LIMIT[dtype])


# Each pair of a case and a class of shapes is a compilation of about a second, so not every product is taken.
CASES = [
    (torch.bfloat16, "silu", False),
    (torch.bfloat16, "silu", True),
    (torch.bfloat16, "gelu_tanh", True),
    (torch.float16, "gelu", False),
    (torch.float32, "silu", True),
    (torch.float32, "gelu_tanh", False),
]
PAIRS = [("odd", case) for case in CASES]
PAIRS += [("wide", CASES[0]), ("wide", CASES[1]), ("one sample", CASES[2]), ("one element", CASES[4])]
PAIRS += [("nothing scored", CASES[0])]


@pytest.mark.parametrize(("shape", "case"), PAIRS)
def test_gated_and_plain(shape, case):
    dtype, activation, routed = case
    (dh, gate, up), routing, segments, index = inputs(shape, dtype, routed)
    wide = [x.double() for x in (dh, gate, up)]
    forward = gated_forward(gate, up, activation, *routing)
    agree(forward, gated_forward_reference(*wide[1:], activation, *routing), 2 * LIMIT[dtype])
    bias = up[0]
    forward = plain_forward(gate, activation, bias, *routing)
    agree(forward, plain_forward_reference(wide[1], activation, bias.double(), *routing), 2 * LIMIT[dtype])
    for reduce in ("mean_abs", "abs_sum") if shape == "odd" else ("mean_abs",):
        asked = {"segments": segments, "reduce": reduce, "h_columns": index, "emit_h": True}
        more = {"gate_columns": index[:1], "up_columns": torch.arange(gate.shape[1], device=DEVICE)}
        got = gated_backward(dh, gate, up, activation, *routing, **asked, **more)
        agree_all(got, gated_backward_reference(*wide, activation, *routing, **asked, **more), dtype)
        got = plain_backward(dh, gate, activation, bias, *routing, **asked, pre_columns=index)
        want = plain_backward_reference(*wide[:2], activation, bias.double(), *routing, **asked, pre_columns=index)
        agree_all(got, want, dtype)


@pytest.mark.parametrize("way", ["kernel", "select"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_sums(dtype, way, monkeypatch):
    """Gradients alone and with columns are configurations of their own; columns come from the kernel or after it."""
    monkeypatch.setenv("SLICETUNE_COLUMNS", way)
    (dh, gate, up), _, _, index = inputs("odd", dtype, False)
    wide = [x.double() for x in (dh, gate, up)]
    for asked in ({}, {"gate_columns": index, "up_columns": index[:7], "emit_h": True}, {"h_columns": index}):
        got = gated_backward(dh, gate, up, "silu", **asked)
        agree_all(got, gated_backward_reference(*wide, "silu", **asked), dtype)
    for asked in ({}, {"pre_columns": index, "emit_h": True}):
        got = plain_backward(dh, gate, "gelu_tanh", up[0], **asked)
        agree_all(got, plain_backward_reference(*wide[:2], "gelu_tanh", wide[2][0], **asked), dtype)


def test_silu_over_the_whole_range():
    """The sigmoid of two approximate instructions: each value by itself, tests/kernels/test_activations.py's bound."""
    x = torch.linspace(-86, 86, 1 << 20, device=DEVICE).reshape(1024, 1024)
    want = x.double() * torch.sigmoid(x.double())
    error = (gated_forward(x, torch.ones_like(x), "silu").double() / want - 1).abs()
    assert float(error[want != 0].max()) < 1e-5
    ends = torch.tensor([[-float("inf"), float("inf"), float("nan"), 0.0]], device=DEVICE)
    got = gated_forward(ends, torch.ones_like(ends), "silu")[0].tolist()
    assert got[1] == float("inf")
    assert got[3] == 0
    assert got[2] != got[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd", "wide"])
def test_in_place_and_again_to_the_bit(shape, dtype):
    (dh, gate, up), _, segments, index = inputs(shape, dtype, False)
    asked = {"segments": segments, "up_columns": index, "emit_h": True}
    want = gated_backward(dh, gate, up, "silu", **asked)
    for inplace in (False, True):
        got = gated_backward(dh.clone(), gate.clone(), up.clone(), "silu", **asked, inplace=inplace)
        for name, value in vars(want).items():
            assert value is None or torch.equal(value, getattr(got, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd", "wide", "one sample", "one element"])
def test_tap(shape, dtype):
    (y, dy, _), _, segments, _ = inputs(shape, dtype, False)
    for reduce in ("mean_abs", "abs_sum"):
        agree(tap(y, dy, segments, reduce), tap_reference(y.double(), dy.double(), segments, reduce), SUMS)


@pytest.mark.parametrize("neurons", [1, 333, 4096])
def test_histogram(neurons):
    torch.manual_seed(neurons)
    scores = torch.randn(70, neurons, device=DEVICE).abs() ** 6
    scores[0, 0] = 0
    groups = torch.randint(0, 3, (70,), device=DEVICE)
    counts = torch.zeros(3, neurons, BINS, dtype=torch.int32, device=DEVICE)
    want = counts.clone()
    for _ in range(2):
        accumulate(scores, groups, counts, -20)
        accumulate_reference(scores, groups, want, -20)
    assert torch.equal(counts, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "out", "inner", "k"), [(1000, 600, 520, 7), (8192, 1024, 4096, 143), (300, 700, 64, 700)]
)
def test_slice_gradient(tokens, out, inner, k, dtype):
    torch.manual_seed(k)
    dy, x = (torch.randn(tokens, n, device=DEVICE).to(dtype) for n in (out, inner))
    rows = torch.randperm(out, device=DEVICE)[:k].sort().values
    columns = torch.randperm(inner, device=DEVICE)[: min(k, inner)].sort().values
    limit = 2e-5 if dtype == torch.float32 else 1e-4
    agree(row_gradient(dy, x, rows), dy[:, rows].double().t() @ x.double(), limit)
    agree(column_gradient(dy, x, columns), x[:, columns].double().t() @ dy.double(), limit)
    assert torch.equal(row_gradient(dy, x, rows), row_gradient(dy, x, rows))


@pytest.mark.skipif(not GPU, reason="a CPU has the emulated product alone")
@pytest.mark.parametrize(("tokens", "out", "inner"), [(480, 1024, 4096), (37, 14336, 512), (1, 64, 32), (100, 130, 72)])
def test_float8(tokens, out, inner):
    """The GPU's scaled product is the emulated one, forward and backward; sizes that it lacks are emulated."""
    torch.manual_seed(out)
    weight, x, dy = (torch.randn(*n, device=DEVICE).bfloat16() for n in ((out, inner), (tokens, inner), (tokens, out)))
    values, scales = float8.quantised(weight)
    host = float8.quantised(weight.cpu())
    assert torch.equal(values.cpu().view(torch.uint8), host[0].view(torch.uint8))
    assert torch.equal(scales.cpu(), host[1])
    for multiply, a in ((float8.product, x), (float8.pull, dy)):
        got = multiply(a, values, scales)
        agree(got, multiply(a.float(), values, scales), LIMIT[torch.bfloat16])  # float32 is always emulated
        assert torch.equal(got, multiply(a, values, scales))
        a[0, 3] = float("inf")
        assert multiply(a, values, scales)[0].isnan().all()


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer(dtype, master, moments):
    """Three steps over rows and columns of several weights, the same on the device as by torch on the host."""
    results = []
    for device in (DEVICE, torch.device("cpu")):
        draw = torch.Generator().manual_seed(0)
        params = []
        for axis, size in ((0, (256, 512)), (1, (300, 96)), (0, (17, 33))):
            weight = torch.randn(*size, generator=draw).to(device, dtype)
            index = torch.randperm(size[axis], generator=draw)[:9].to(device)
            rows = weight[index] if axis == 0 else weight[:, index].t()
            p = nn.Parameter(rows.contiguous().clone())
            p.slice_of = (weight, index, axis)
            params.append(p)
        optimizer = SparseColumnAdamW(params, lr=1e-2, weight_decay=0.1, moments=moments, master=master)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(*p.shape, generator=draw).to(device, dtype)
            optimizer.step(grad_scale=torch.tensor([0.5], device=device))
        for p in params:
            weight, index, axis = p.slice_of
            assert torch.equal(weight[index] if axis == 0 else weight[:, index].t(), p.detach())
        results.append([p.detach().cpu() for p in params])
    for got, want in zip(*results, strict=True):
        agree(got, want, 1e-6 if dtype == torch.float32 and moments == "float32" else 1e-2)


def small_model():
    import systems
    from shapes import Load

    from slicetune.engine.models.shapes import llama

    load = Load(llama("small", 2, 256, 688, 4, 2, 512), 4, 24)
    return systems, load, systems.random_model(load.model).float()


def test_engine_step_equals_full_gradients():
    systems, load, model = small_model()
    neurons = systems.random_neurons(load.model, 0.1)
    system = systems.slices(model, systems.batch_of(load), neurons)
    sites = sites_module.find_ffns(model)
    system.gradients()
    model.requires_grad_(True)
    systems.System(model, system.batch, []).gradients()
    chosen = [(key, neurons.slices[key]) for key in sorted(neurons.slices) if len(neurons.slices[key])]
    for p, ((layer, role, _), index) in zip(system.params, chosen, strict=True):
        weight = getattr(sites[layer].module, sites[layer].projections[role]).weight
        agree(p.grad, weight.grad[index.to(DEVICE)], 1e-3)


def test_scores_equal_hooks():
    from authors import HookScorer

    systems, load, model = small_model()
    hooks = HookScorer(copy.deepcopy(model))
    examples = systems.sentences(load)
    hooks.score(examples)
    statistics = Statistics(["a", "b", "c", "d"], load.model, device=DEVICE)
    scoring.score(model, examples, statistics, ScoreConfig(tokens_per_batch=64))
    totals = torch.cat([statistics.total[p] for p in statistics.widths], -1).flatten(1).cpu()
    for example, scores in zip(examples, hooks.scores, strict=True):
        agree(totals[example.group], scores, 1e-3)
