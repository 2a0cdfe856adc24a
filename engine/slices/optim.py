"""SparseColumnAdamW: AdamW for a few rows and columns of frozen weights. Needs torch alone; uses Triton where it is.

Before, and after with two rows of one layer:

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    params = slice_linears(model, rows={"model.layers.0.mlp.up_proj": [3, 17]})
    optimizer = SparseColumnAdamW(params, lr=1e-4)

`slice_linears` is in linear.py, the formula in kernels/adamw/reference.py. DeepSpeed, DDP, Accelerate or a Trainer take
the optimizer as any other of torch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...kernels.adamw.op import adamw_
from ...kernels.adamw.reference import BLOCK, Slice, rounding_key, scatter
from ...kernels.common.dispatch import PLAIN, use_triton
from ..common.errors import UserError
from .kept import COUNT, Kept, Member


class SparseColumnAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW over compact slice parameters; each step also writes them into the weights they come from.

    A parameter `p` of shape [k, width] with `p.slice_of = (weight, index, axis)` holds the rows (axis 0) or columns
    (axis 1, each stored as a row) `index` of `weight`. Parameters without it are updated as by torch.optim.AdamW. In
    float32 the results equal torch.optim.AdamW's bit for bit on the CPU.

    params: parameters or groups. A group may set lr, betas, eps, weight_decay, and `active`: a group with
    `active=False` is skipped whole, so its values, moments and step count stay, but its (zero) state exists. Other keys
    are kept as they are.
    moments: "float32", or "8bit": codes of one byte with an absolute maximum for each 256 elements.
    master: keep float32 values for bfloat16 and float16 parameters. Without it bfloat16 ones are rounded at random
    (unbiased, the same bits on every rank for the same `seed`).

    Raises UserError for settings out of range, and for float16 parameters without a master.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str = "float32",
        master: bool = True,
        seed: int = 0,
    ) -> None:
        _check(lr, betas, eps, weight_decay, moments)
        self.moments, self.master, self.seed = moments, master, seed
        self._kept: Kept | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "active": True}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "moments": self.moments, "master": self.master, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._kept = None
        for group in self.param_groups:
            group.setdefault("active", True)

    @torch.no_grad()
    def step(self, closure: Callable | None = None, *, grad_scale: Tensor | None = None):
        """One update. grad_scale: one-element float32 tensor (see `clip_factor`) that multiplies every gradient.

        It stays on its device, so clipping costs no synchronisation. Parameters without a gradient are left alone.
        Returns what closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._kept is not None and (grads := self._kept.fitting(self)):
            self._kept.step(self, grads, grad_scale)
            return loss
        members: list[Member] = []
        for ordinal, (group, p) in enumerate(self._parameters()):
            takes_part = group["active"] and p.grad is not None
            if takes_part or not group["active"]:
                self._create(p)
            if takes_part:
                members.append((ordinal, group, p, self.state[p], p.grad))
        self._kept = None
        if members and all(type(p) in PLAIN and p.numel() and use_triton(p) for _, _, p, _, _ in members):
            self._kept = Kept(self, [self._slice(*member, counts=False) for member in members], members)
            self._kept.step(self, [grad for *_, grad in members], grad_scale)
        else:
            adamw_([self._slice(*member) for member in members], grad_scale)
        return loss

    def create_state(self, param: Tensor | None = None, steps: int | None = None) -> None:
        """Zero state where there is none for `param`, or for every parameter; `steps` sets the count of past steps.

        A flat partition of DeepSpeed can be given although it is in no group of this optimizer at the time.
        """
        for p in [p for _, p in self._parameters()] if param is None else [param]:
            self._create(p)
            if steps is not None:
                self.state[p][COUNT].fill_(steps)

    def write_back(self) -> None:
        """Write every slice into its weight as it is now, as after loading parameters from a file."""
        write_back(p for _, p in self._parameters())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load exactly what `state_dict` saved: torch would cast masters and codes to the parameter's type.

        Raises UserError when the saved moments or masters are not of this optimizer's kind.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (_, p) in zip(saved, self._parameters(), strict=True):
            entry = state_dict["state"].get(i)
            if not entry:
                continue
            if (entry["exp_avg"].dtype, "master" in entry) != (self._moment_dtypes(p)[0], self._has_master(p)):
                kind = f"{entry['exp_avg'].dtype} moments, {'a' if 'master' in entry else 'no'} master"
                own = f"moments={self.moments!r}, master={self.master}"
                raise UserError(f"optimizer state: saved with {kind}; not {own}: use the settings it was saved with")
            self.state[p] = {
                k: v.clone() if k == COUNT else v.to(p.device, copy=True) if isinstance(v, Tensor) else v
                for k, v in entry.items()
            }

    def _parameters(self) -> Iterator[tuple[dict, Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    def _has_master(self, p: Tensor) -> bool:
        return self.master and p.dtype in (torch.bfloat16, torch.float16)

    def _moment_dtypes(self, p: Tensor) -> tuple[torch.dtype, torch.dtype]:
        if self.moments == "8bit":
            return torch.int8, torch.uint8
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        return dtype, dtype

    def _create(self, p: Tensor) -> None:
        state = self.state[p]
        if state:
            return
        if not p.is_contiguous():
            raise UserError(f"parameter of shape {tuple(p.shape)}: not contiguous; pass a contiguous one")
        if p.dtype == torch.float16 and not self.master:
            raise UserError("float16 parameter without a master: use master=True, or bfloat16 for stochastic rounding")
        mean, square = self._moment_dtypes(p)
        state[COUNT] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, dtype=mean, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=square, memory_format=torch.contiguous_format)
        if self.moments == "8bit":
            blocks = -(-_local(p).numel() // BLOCK)
            state["exp_avg_absmax"] = torch.zeros(blocks, device=p.device)
            state["exp_avg_sq_absmax"] = torch.zeros(blocks, device=p.device)
        if self._has_master(p):
            state["master"] = p.detach().float().clone()

    def _slice(self, ordinal: int, group: dict, p: Tensor, state: dict, grad: Tensor, counts: bool = True) -> Slice:
        """A parameter's part in this step, which is counted here unless `counts` is False."""
        if grad.is_sparse:
            raise UserError("sparse gradient: use dense gradients (nn.Embedding(sparse=False))")
        step = int(state[COUNT].add_(1) if counts else state[COUNT])
        weight, index, axis = getattr(p, "slice_of", (None, None, 0))
        if hasattr(p, "to_local"):
            weight = None  # a shard of a slice: whoever gathers it writes it back
        random = self.moments == "8bit" or (p.dtype == torch.bfloat16 and "master" not in state)
        return Slice(
            param=_local(p),
            grad=_local(grad).contiguous(),
            exp_avg=_local(state["exp_avg"]),
            exp_avg_sq=_local(state["exp_avg_sq"]),
            step=step,
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            master=_local(state["master"]) if "master" in state else None,
            exp_avg_absmax=state.get("exp_avg_absmax"),
            exp_avg_sq_absmax=state.get("exp_avg_sq_absmax"),
            weight=weight,
            index=index,
            axis=axis,
            key=rounding_key(self.seed, ordinal, step) if random else 0,
        )


@torch.no_grad()
def write_back(params) -> None:
    """Write each slice (a parameter with `slice_of`) into its weight; parameters without it are left alone."""
    for p in params:
        if hasattr(p, "slice_of"):
            weight, index, axis = p.slice_of
            scatter(p.detach(), weight.detach(), index, axis)


@torch.no_grad()
def clip_factor(params, max_norm: float) -> tuple[Tensor, Tensor]:
    """(factor, norm) of the gradients as device tensors: `step(grad_scale=factor)` is clip_grad_norm_(…, max_norm).

    The gradients themselves stay as they are, and nothing waits for the device.
    """
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).float(), norm


def _local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor (FSDP2); any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def _check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, moments: str) -> None:
    if not lr >= 0:
        raise UserError(f"lr {lr}: must not be negative")
    if not all(0 <= b < 1 for b in betas):
        raise UserError(f"betas {betas}: each must be in [0, 1)")
    if not eps >= 0:
        raise UserError(f"eps {eps}: must not be negative")
    if not weight_decay >= 0:
        raise UserError(f"weight_decay {weight_decay}: must not be negative")
    if moments not in ("float32", "8bit"):
        raise UserError(f'moments {moments!r}: must be "float32" or "8bit"')
