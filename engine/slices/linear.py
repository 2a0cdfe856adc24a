"""SliceLinear: a frozen weight of which a few rows or columns are trained.

The selected slices are small parameters of their own; the weight itself holds their current values, so the forward
is one matrix product and the backward computes weight gradients for the selected slices only. No gradient masks:
optimizers, ZeRO, DDP, FSDP and clipping see ordinary parameters of the size that is really trained.

    params = slice_linears(model, rows={"layers.0.up_proj": [3, 17]})
    optimizer = SparseColumnAdamW(params, lr=1e-3)

Needs torch alone. Next: fused.py, which makes one FFN of three of these.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.common.outputs import wide
from ...kernels.slice_gradient import column_gradient, compact_gradient, row_gradient
from ..common.errors import UserError
from ..common.private import unviewed
from ..models.linears import check_linear, check_linears, checked_index, index_in
from ..models.quantised.layers import is_quantised
from ..models.quantised.stored import remember
from .frozen import products
from .frozen.layer import Part, SlicedLinear
from .written import Place, gathered, input_with_gradient, is_partitioned, keep_current

BOTH = "a linear layer cannot train rows and columns at once: the weights where they cross would have two owners"


class SliceLinear(SlicedLinear):
    """A linear layer whose `rows` [k, in] and `columns` [k, out] are trained and whose weight [out, in] is frozen.

    Row j of the weight is output channel j (the papers' column, they write W as in × out); its bias entry belongs to
    it. Column j is what input j feeds. Raises UserError if rows and columns are both chosen.
    """

    def __init__(self, linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        if rows is not None and columns is not None:
            raise UserError(BOTH)
        check_linear(linear)
        super().__init__(linear)
        self.row_index = self.column_index = None
        self.rows = self.columns = self.bias_rows = None
        with gathered([self.weight, self.bias]):
            self._take(rows, columns)
        self.__dict__["original"] = linear  # not a child of this layer: `plain` gives it back
        self.link()
        keep_current(self)
        self.register_forward_pre_hook(input_with_gradient)

    def _take(self, rows: Tensor | None, columns: Tensor | None) -> None:
        if rows is not None:
            self._own("row_index", checked_index(rows, self.out_features, "row"))
            self.rows = nn.Parameter(self.take(0, self.row_index))
            if self.bias is not None:
                self.bias_rows = nn.Parameter(self.bias.detach()[self.row_index].clone())
        if columns is not None:
            self._own("column_index", checked_index(columns, self.in_features, "column"))
            self.columns = nn.Parameter(self.take(1, self.column_index))

    def _own(self, name: str, index: Tensor) -> None:
        delattr(self, name)
        self.register_buffer(name, index.to(self.device), persistent=False)

    def plain(self) -> nn.Linear:
        """The layer that this one was made of, with the trained values. An optimizer of the slices moves it no more."""
        self.refresh()
        for parameter in self.trainable():
            del parameter.slice_of
        self.original.weight, self.original.bias = self.weight, self.bias
        return self.original.train(self.training)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module. DeepSpeed's ZeRO-3 saves a layer by it, gathered: its weight must be written by then."""
        found = list(super().named_parameters(*args, **kwargs))
        if all(hasattr(p, "ds_id") and not is_partitioned(p) for _, p in found):
            self.refresh()
        return iter(found)

    def link(self) -> None:
        """Tell the optimizer where a slice lies, so that its fused step may write the weight too."""
        for parameter, _, axis, _ in self.parts():
            parameter.slice_of = Place((None, None, axis))
        for parameter, tensor, axis, index in self.slices():
            parameter.slice_of = Place((getattr(self, tensor), index, axis))
        # Weakly: a wrapper that shards the model frees this tensor.
        self.placed = _nothing if self.weight is None else weakref.ref(self.weight)
        self.linked = object()  # another one whenever tensors have moved

    def __getstate__(self) -> dict:
        # A copy's optimizer has promised nothing: its forwards write again.
        return {name: value for name, value in self.__dict__.items() if name not in ("placed", "linked", "left")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.link()  # a copied or loaded parameter has no attributes

    def _apply(self, fn, recurse: bool = True):
        self.placed = _nothing  # FSDP2's weights are swapped, and torch swaps none that is weakly referred to
        super()._apply(fn, recurse)
        self.link()  # .to(device) makes new buffers
        return self

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in (self.rows, self.columns, self.bias_rows) if p is not None]

    def parts(self) -> list[Part]:
        found = (
            (self.rows, "weight", 0, self.row_index),
            (self.columns, "weight", 1, self.column_index),
            (self.bias_rows, "bias", 0, self.row_index),
        )
        return [part for part in found if part[0] is not None]

    def before_backward(self) -> None:
        """Write them again where the weight is not the one that the forward read.

        Under ZeRO-3 and FSDP it is a fresh copy each time it is gathered; elsewhere nothing has changed.
        """
        if hasattr(self.weight, "ds_id") or self.weight is not self.placed():
            self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return _SliceLinear.apply(x, self, self.rows, self.columns, self.bias_rows)

    def gradients(
        self,
        dy: Tensor,
        x: Tensor | None,
        dy_columns: Tensor | None = None,
        x_columns: Tensor | None = None,
        product: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/d(rows, columns, bias_rows) from dy [T, out] and x [T, in], in the parameters' dtype.

        `dy_columns` [T, k] = dy[:, row_index] and `x_columns` [T, k] = x[:, column_index], where a kernel has emitted
        them, are used instead; x may be None where `x_columns` is all that is needed. `product` [k, in] is
        dy_columnsᵀ x, where a product of several layers has given it already.
        """
        rows = columns = bias = None
        if self.rows is not None:
            if product is None:
                product = row_gradient(dy, x, self.row_index) if dy_columns is None else compact_gradient(dy_columns, x)
            rows = product.to(self.rows.dtype)
        if self.bias_rows is not None:
            chosen = dy[:, self.row_index] if dy_columns is None else dy_columns
            bias = chosen.sum(0, dtype=wide(dy)).to(self.bias_rows.dtype)
        if self.columns is not None:
            emitted = x_columns is not None
            product = compact_gradient(x_columns, dy) if emitted else column_gradient(dy, x, self.column_index)
            columns = product.to(self.columns.dtype)
        return rows, columns, bias

    def extra_repr(self) -> str:
        k = [0 if i is None else len(i) for i in (self.row_index, self.column_index)]
        return f"in={self.in_features}, out={self.out_features}, trained rows={k[0]}, trained columns={k[1]}"


class _SliceLinear(torch.autograd.Function):
    """y = x Wᵀ + b; the gradient reaches x and the slices, never the frozen weight."""

    @staticmethod
    def forward(ctx, x, module, rows, columns, bias_rows):
        module.before_forward()
        ctx.module, ctx.x_dtype = module, x.dtype
        dtype = autocast_dtype(x)
        x, bias = cast_for_autocast(x, module.bias)
        ctx.save_for_backward(x if module.trainable() else None)
        y = products.product(x, module, bias, dtype)
        return unviewed(y, y.shape)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        module = ctx.module
        module.before_backward()
        dx = products.pull(dy, module).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, None, None, None
        grads = module.gradients(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dx, None, *grads


def _nothing() -> None:
    """In the place of a weak reference to no weight."""


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's where that is on, on x's device; else None."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Under autocast every operand in its dtype, as F.linear would have it; elsewhere unchanged."""
    dtype = autocast_dtype(x)
    return (x, *others) if dtype is None else tuple(None if t is None else t.to(dtype) for t in (x, *others))


def slice_linears(
    model: nn.Module,
    rows: Mapping[str, Sequence[int] | Tensor] | None = None,
    columns: Mapping[str, Sequence[int] | Tensor] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> list[nn.Parameter]:
    """Freeze `model` and make the named rows and columns of its `nn.Linear` layers trainable, in place.

    Returns the new parameters, to be given to an optimizer; `slices.merge(model)` gives the plain layers back. `base`
    is as for `ffn.attach`. Raises UserError for a name that is no `nn.Linear`, an index outside the layer, and a model
    that trains slices already.
    """
    refuse_slices(model)
    if base is not None:
        remember(model, base)
    rows, columns = rows or {}, columns or {}
    if not (isinstance(rows, Mapping) and isinstance(columns, Mapping) and (rows or columns)):
        raise UserError('name what to train: slice_linears(model, rows={"model.layers.0.mlp.up_proj": [3, 17]})')
    if twice := rows.keys() & columns.keys():
        raise UserError(f"{min(twice)}: {BOTH}")
    named = [(name, axis, index) for axis, own in (("rows", rows), ("columns", columns)) for name, index in own.items()]
    chosen = [(name, axis, index_in(model, name, axis, index)) for name, axis, index in named]
    check_linears(model, [name for name, *_ in chosen])
    model.requires_grad_(False)
    params: list[nn.Parameter] = []
    for name, axis, index in chosen:
        params += slice_linear(model, name, **{axis: index}).trainable()
    if is_quantised(model):
        model.save_pretrained = _refuse_saving
    return params


def _refuse_saving(*_: Any, **__: Any) -> None:
    """transformers would write the numbers of the quantisation, under names that no other model has."""
    raise UserError(
        "the model trains slices beside quantised weights: ffn.save(model, folder) writes it as a plain one"
    )


def slice_linear(model: nn.Module, name: str, **index: Tensor) -> SliceLinear:
    """Put a SliceLinear in the place of the layer `name`, which loses its weight to it."""
    linear = model.get_submodule(name)
    sliced = SliceLinear(linear, **index)
    # A wrapper that shards the model, FSDP2 for one, can free the weight only where nobody else holds it.
    if sliced.frozen is None:
        linear.weight = linear.bias = None
    model.set_submodule(name, sliced)
    return sliced


def refuse_slices(model: nn.Module) -> None:
    """Raises UserError for a model that trains slices: other ones would freeze them, and their optimizer go on."""
    found = [name for name, module in model.named_modules() if hasattr(module, "before_forward")]
    if found:
        raise UserError(
            f"the model trains slices already ({found[0]}; {len(found)} layers): call slices.merge(model) first, which "
            "keeps what they were trained to, and make a new optimizer"
        )
