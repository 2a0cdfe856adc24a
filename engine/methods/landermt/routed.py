"""The routed FFN of LANDeRMT (Eq. 6-9): each token's language pair says which units take part, and how much.

    input:   h = act(c·(x Wgᵀ)) · (c·(x Wuᵀ)),  h = act(c·(x W1ᵀ) + b1) for BLOOM,  0 where c = 0;   y = h Wdᵀ + b2
    output:  h = c · act(x Wgᵀ) · (x Wuᵀ),      h = c · act(x W1ᵀ + b1);                            y = h Wdᵀ + b2

c is a row of a gain table [pairs, I]: 0 where a unit takes no part, 1 throughout for a pair that leaves the layer as
it is. One Router, which all routed FFNs of a model share, says which row each token takes, so a batch may mix pairs.
Next: routing.py, which puts them into a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.common.outputs import wide
from ....kernels.gated.op import gated_backward, gated_forward
from ....kernels.plain.op import plain_backward, plain_forward
from ....kernels.slice_gradient import compact_gradient
from ...common.errors import UserError
from ...common.private import unviewed
from ...data.batching import Batch
from ...models.sites import FFNSite
from ...slices.frozen.products import dtype_of, product, pull
from ...slices.fused import FusedFFN, begin, resume
from ...slices.linear import cast_for_autocast
from .owned import OwnedLinear


class Router:
    """Which pair every token of the current batch is of.

    pairs: the rows of the gain tables, by name. groups: what `Example.group` counts, by the same names; needed for
    `read` alone. Raises UserError for a group without a route.
    """

    def __init__(self, pairs: Sequence[str], groups: Sequence[str] = ()) -> None:
        self.pairs, self.groups = tuple(pairs), tuple(groups)
        lost = [group for group in groups if group not in pairs]
        if lost:
            raise UserError(f"no route for {' '.join(lost)}, only for {' '.join(pairs)}: detect with those pairs too")
        self.row_of_group = torch.tensor([self.pairs.index(group) for group in groups])
        self.rows: Tensor | None = None
        """int64, [rows, 1] of a padded batch or [1, tokens] of a packed one."""

    def set(self, pairs: Sequence[str]) -> None:
        """The pair of each row of the next batches, as in decoding. Raises UserError for one without a route."""
        lost = sorted(set(pairs) - set(self.pairs))
        if lost:
            raise UserError(f"no route for {' '.join(lost)}: the model was routed for {' '.join(self.pairs)}")
        self.rows = torch.tensor([self.pairs.index(pair) for pair in pairs])[:, None]

    def read(self, batch: Batch) -> None:
        """Take the pairs from a batch's groups."""
        rows = self.row_of_group.to(batch.groups.device)[batch.groups]
        if batch.position_ids is None:
            self.rows = rows[:, None]
        else:
            lengths, tokens = (batch.segments[:, 1] - batch.segments[:, 0]).long(), batch.input_ids.numel()
            self.rows = rows.repeat_interleave(lengths, output_size=tokens)[None]  # its size is known: no waiting

    def of(self, x: Tensor) -> Tensor:
        """int64 [rows · width]: the gain row of every token of x [rows, width, H]."""
        assert self.rows is not None, "the router was not told the pairs of this batch"
        return self.rows.to(x.device).expand(x.shape[:-1]).reshape(-1)

    def names(self, groups: Iterable[int]) -> frozenset[str]:
        """The pairs of these values of `Example.group`."""
        return frozenset(self.groups[group] for group in groups)


class RoutedFFN(FusedFFN):
    """A FusedFFN whose units have gains. x [rows, width, H] → the same.

    gains: float32 [pairs, I]; takes: bool [pairs], pairs that route this layer (the others' rows are 1 and train
    nothing here); where: `input` or `output`. Raises UserError for a gated FFN with biases before its activation.
    """

    def __init__(
        self, site: FFNSite, router: Router, gains: Tensor, takes: Tensor, where: str, recompute=False
    ) -> None:
        super().__init__(site, recompute)
        *first, last = self.linears()
        if site.gated and any(linear.bias is not None for linear in first):
            raise UserError(f"{site.name}: a gated FFN with biases cannot be routed: its gain would scale the bias")
        device = next(last.parameters()).device
        self.router, self.where, self.gains, self.takes = router, where, gains.to(device), takes.to(device)
        self.all_take = bool(takes.all())
        self.shares: nn.ParameterDict | None = None
        self.slope: Tensor | None = None

    def learn(self, share: Tensor, low: Tensor, high: Tensor) -> None:
        """Make the shares parameters. share [pairs]: where they begin; low, high [pairs, I]: the gains at 0 and at 1.

        Gains are linear in the share: general units have it, specific ones 1 - share, the others 0 or 1 whatever it is.
        """
        self.gains, self.slope = low.to(self.gains.device), (high - low).to(self.gains.device)
        self.shares = nn.ParameterDict()
        dtype = dtype_of(self.linears()[-1])
        for pair, start, takes in zip(self.router.pairs, share, self.takes, strict=True):
            logit = torch.logit(start.float(), eps=1e-4)[None].to(self.gains.device, dtype)
            self.shares[pair] = nn.Parameter(logit, requires_grad=bool(takes))

    def gain(self) -> Tensor:
        """float32 [pairs, I]: the gain table as it is now."""
        if self.shares is None:
            return self.gains
        logits = torch.cat(list(self.shares.values()))
        return self.gains + torch.sigmoid(logits.to(wide(logits)))[:, None] * self.slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        slots = [p for linear in self.linears() if isinstance(linear, OwnedLinear) for p in linear.slots()]
        y = _RoutedFFN.apply(x, self, self.router.of(x), self.gain(), *slots)
        return y if residual is None else residual + y


class _RoutedFFN(torch.autograd.Function):
    """As fused._GatedFFN and _PlainFFN: saves x and the pre-activations, recomputes h."""

    @staticmethod
    def forward(ctx, x, ffn, rows, gain, *slots):
        *first, last = ffn.linears()
        x2, dtype = begin(x.reshape(-1, x.shape[-1]), *first, last)
        pre = [product(x2, linear, dtype=dtype) for linear in first]
        *_, inner, outer = cast_for_autocast(x2, first[0].bias, last.bias)
        y = product(_activate(ffn, pre, inner, gain.detach(), rows), last, outer, dtype)
        ctx.ffn, ctx.x_dtype = ffn, x.dtype
        ctx.save_for_backward(x2, rows, gain, *([] if ffn.recompute else pre))
        return unviewed(y, (*x.shape[:-1], y.shape[-1]))  # Falcon adds to it in place

    @staticmethod
    def backward(ctx, dy):
        x, rows, gain, *pre = ctx.saved_tensors
        ffn = ctx.ffn
        *first, last = ffn.linears()
        shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
        resume(*first, last)
        pre = pre or [product(x, linear, dtype=dy.dtype) for linear in first]
        back = _pull(ffn, pull(dy, last), pre, gain.detach(), rows, ctx.needs_input_grad[3])
        dx = None
        if ctx.needs_input_grad[0]:
            for d, linear in zip(back.dpre, first, strict=True):
                dx = pull(d, linear, dx)
            dx = dx.to(ctx.x_dtype).view(*shape[:-1], -1)
        slots = _slot_gradients(ffn, x, dy, rows, gain.detach(), back)
        return dx, None, None, back.dgain, *slots


class _Pull(NamedTuple):
    """What comes back through the activation."""

    dpre: list[Tensor]
    """[T, I] each."""
    units: list[Tensor]
    """The same at the owned units of each first layer, [T, k]."""
    h: Tensor | None
    """What entered the last layer, at its owned units [T, k]."""
    dgain: Tensor | None
    """[pairs, I]."""


def _activate(ffn: RoutedFFN, pre: list[Tensor], bias: Tensor | None, gain: Tensor, rows: Tensor) -> Tensor:
    inner = (gain, rows) if ffn.where == "input" else (None, None)
    if len(pre) == 2:
        h = gated_forward(*pre, ffn.activation, *inner)
    else:
        h = plain_forward(*pre, ffn.activation, None if bias is None else bias.detach(), *inner)
    return h if ffn.where == "input" else _scaled(h, gain, rows)


def _pull(ffn: RoutedFFN, dh: Tensor, pre: list[Tensor], gain: Tensor, rows: Tensor, wants_gain: bool) -> _Pull:
    """dL/dc is, over a pair's tokens, Σ h·dh for `output` and Σ (pre·dpre)/c for `input`."""
    *first, last = ffn.linears()
    outside, chosen = ffn.where == "output", [_index(linear) for linear in first]
    h_index = None if outside else _index(last)
    options = {"h_columns": h_index, "emit_h": outside or (isinstance(last, OwnedLinear) and h_index is None)}
    inner, d, sums = ((None, None), _scaled(dh, gain, rows), {}) if outside else ((gain, rows), dh, {})
    if len(pre) == 2:
        if wants_gain and not outside:
            segments, order = _runs(rows)
            sums = {"segments": segments, "reduce": "abs_sum"}
        options |= {"gate_columns": chosen[0], "up_columns": chosen[1], "inplace": True}
        out = gated_backward(d, *pre, ffn.activation, *inner, **sums, **options)
        dpre, columns = [out.dgate, out.dup], [out.dgate_columns, out.dup_columns]
        score = _by_pair(out.gate_score + out.up_score, order, len(gain)) if sums else None
    else:
        bias = None if first[0].bias is None else first[0].bias.detach()
        out = plain_backward(d, *pre, ffn.activation, bias, *inner, pre_columns=chosen[0], **options)
        dpre, columns = [out.dpre], [out.dpre_columns]
        score = _by_pair(pre[0] * out.dpre, rows, len(gain)) if wants_gain and not outside else None
    dgain = None
    if wants_gain:
        dgain = _by_pair(out.h * dh, rows, len(gain)) if outside else _over(score, gain)
    units = [whole if few is None else few for whole, few in zip(dpre, columns, strict=True)]
    h = out.h if out.h_columns is None else out.h_columns
    if outside and isinstance(last, OwnedLinear):
        h = _scaled(h, gain, rows)
        h = h if last.index is None else h[:, last.index]
    return _Pull(dpre, units, h, dgain)


def _slot_gradients(
    ffn: RoutedFFN, x: Tensor, dy: Tensor, rows: Tensor, gain: Tensor, pull: _Pull
) -> tuple[Tensor, ...]:
    """Gradients of every owner's slices; tokens of pairs that leave this layer alone give none."""
    *first, last = ffn.linears()
    if not ffn.all_take:
        keep = ffn.takes[rows].to(x.dtype)[:, None]
        x, dy = x * keep, dy * keep
    grads = ()
    for linear, units in zip(first, pull.units, strict=True):
        if isinstance(linear, OwnedLinear):
            bias = None
            if linear.bias is not None:  # dL/dz, which is dpre/c, summed over the tokens of each pair
                bias = _by_pair(units, rows, len(gain))
                c = gain if linear.index is None else gain[:, linear.index]
                bias = _over(bias, c) if ffn.where == "input" else bias
                bias = (bias * ffn.takes[:, None]).sum(0)
            grads += linear.gradients(units, x, bias)
    if isinstance(last, OwnedLinear):
        grads += last.gradients(pull.h, dy, dy.sum(0, dtype=wide(dy)))
    return grads


def _scaled(h: Tensor, gain: Tensor, rows: Tensor) -> Tensor:
    return (h * gain[rows]).to(h.dtype)


def _over(values: Tensor, c: Tensor) -> Tensor:
    """values / c, and 0 where c = 0."""
    return torch.where(c == 0, 0, values / torch.where(c == 0, 1, c))


def _by_pair(values: Tensor, rows: Tensor, pairs: int) -> Tensor:
    """[pairs, I] in at least float32: sums of values [T, I] over the tokens of each pair, in a fixed order."""
    return compact_gradient(F.one_hot(rows, pairs).to(values.dtype), values)


def _runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [runs, 2]: ranges of neighbouring tokens of one pair; and each range's row."""
    order, counts = torch.unique_consecutive(rows, return_counts=True)
    ends = counts.cumsum(0)
    return torch.stack([ends - counts, ends], 1).to(torch.int32), order


def _index(linear: nn.Linear | OwnedLinear) -> Tensor | None:
    return linear.index if isinstance(linear, OwnedLinear) else None
