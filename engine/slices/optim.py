"""SparseColumnAdamW: AdamW for a few rows and columns of frozen weights. Needs torch alone; uses Triton where it is.

Before, and after with two rows of one layer:

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    params = slice_linears(model, rows={"model.layers.0.mlp.up_proj": [3, 17]})
    optimizer = SparseColumnAdamW(params, lr=1e-4)

`slice_linears` is in linear.py, the formula in kernels/adamw/reference.py. DeepSpeed, DDP, Accelerate or a Trainer take
the optimizer as any other of torch.
"""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...kernels.adamw.op import adamw_
from ...kernels.adamw.reference import Slice, rounding_key, scatter
from ...kernels.common.dispatch import PLAIN, use_triton
from ..common.errors import UserError
from .kept import COUNT, Kept, Member
from .state import adopt, check_group, check_state_dict, check_types, fresh, local, own_maxima, restored


class SparseColumnAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW over compact slice parameters; each step also writes them into the weights they come from.

    A parameter `p` of shape [k, width] with `p.slice_of = (weight, index, axis)` holds the rows (axis 0) or columns
    (axis 1, each stored as a row) `index` of `weight`. Parameters without it are updated as by torch.optim.AdamW. In
    float32 the results equal torch.optim.AdamW's bit for bit on the CPU.

    params: parameters or groups. A group may set lr, betas, eps, weight_decay, and `active`: a group with
    `active=False` is skipped whole, so its values, moments and step count stay, but its (zero) state exists. Other keys
    are kept as they are.
    moments: "float32", or "8bit": codes of one byte with an absolute maximum for each 256 elements. Those of FSDP2
    shards load into as many shards alone: blocks end where shards do.
    master: keep float32 values for bfloat16 and float16 parameters; they follow what a model's load_state_dict loads.
    Without it bfloat16 ones are rounded at random (unbiased, the same bits on every rank for the same `seed`).

    Copy or pickle `(model, optimizer)` together: a copy of the optimizer alone has parameters of no model, and writes
    into no weight.

    Raises UserError, a ValueError, for settings out of range; for options of torch.optim.AdamW that are not done here
    (state.py) where they are on; for complex and integer parameters; for float16 ones without a master.
    """

    _warned = False

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str = "float32",
        master: bool = True,
        seed: int = 0,
    ) -> None:
        if moments not in ("float32", "8bit"):
            raise UserError(f'moments {moments!r}: must be "float32" or "8bit"')
        self.moments, self.master, self.seed = moments, master, seed
        self._kept: Kept | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "active": True}
        check_group(defaults)
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
        # torch.compile would cut a step at every count into some twenty graphs, whose results are other bits.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._step)(closure, grad_scale)
        return self._step(closure, grad_scale)

    def _step(self, closure: Callable | None, grad_scale: Tensor | None):
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
        if not members:
            self._say_if_idle()
        if members and all(type(p) in PLAIN and p.numel() and use_triton(p) for _, _, p, _, _ in members):
            self._kept = Kept(self, [self._slice(*member, counts=False) for member in members], members)
            self._kept.step(self, [grad for *_, grad in members], grad_scale)
        else:
            adamw_([self._slice(*member) for member in members], grad_scale)
        return loss

    def _say_if_idle(self) -> None:
        """Warn, once, of a step that cannot train: its parameters are not those that the model has now."""
        if not self._warned and any(group["params"] for group in self.param_groups if group["active"]):
            self._warned = True
            warnings.warn(
                "no parameter of this optimizer has a gradient, so the step changes nothing. Was it made before "
                "ffn.attach or after slices.merge? Make it of the parameters that attach returned.",
                stacklevel=5,
            )

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

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. Raises UserError, and leaves the optimizer as it was, for what the class refuses."""
        super().add_param_group(param_group)
        try:
            check_types(param_group["params"])
            check_group(param_group)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load exactly what `state_dict` saved: torch would cast masters and codes to the parameter's type.

        A state of torch.optim.AdamW will do where it has the same parts. Hooks are called as torch calls them: ours
        takes what the last before it left, and the first after it finds all in place.

        Raises UserError, and leaves everything as it was, for a state that does not fit: other groups, shapes or
        types, missing parts, values that the class refuses.
        """
        entries: dict[Tensor, dict] = {}

        def take(_, given: dict) -> dict:
            check_state_dict(given, self.param_groups)
            ids = [i for group in given["param_groups"] for i in group["params"]]
            params = dict(zip(ids, (p for _, p in self._parameters()), strict=True))
            for i, entry in given["state"].items():
                if i in params and entry:
                    entries[params[i]] = restored(entry, params[i], i, self.moments, self.master)
            return {**given, "state": {i: entry for i, entry in given["state"].items() if i not in params}}

        def put(_) -> None:
            self.state.update(entries)
            for p in entries:
                _settle(p)

        hooks = [self.register_load_state_dict_pre_hook(take)]
        hooks.append(self.register_load_state_dict_post_hook(put, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _parameters(self) -> Iterator[tuple[dict, Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    def _create(self, p: Tensor) -> None:
        if not self.state.get(p):
            self.state[p] = fresh(p, self.moments, self.master)

    def _slice(self, ordinal: int, group: dict, p: Tensor, state: dict, grad: Tensor, counts: bool = True) -> Slice:
        """A parameter's part in this step, which is counted here unless `counts` is False."""
        if grad.is_sparse:
            raise UserError("sparse gradient: use dense gradients (nn.Embedding(sparse=False))")
        weight, index, axis = getattr(p, "slice_of", (None, None, 0))
        if hasattr(p, "to_local"):
            weight = None  # a shard of a slice: whoever gathers it writes it back
        elif weight is not None and (p.ndim, len(p)) != (weight.ndim, len(index)):
            raise UserError(
                f"a slice of {len(index)} rows or columns has become a tensor of shape {tuple(p.shape)}, as under "
                "FSDP1: use FSDP2 (fully_shard; Accelerate's fsdp_version: 2)"
            )
        step = int(state[COUNT].add_(1) if counts else state[COUNT])
        if _is_loaded(p) and "master" in state:
            adopt(p, local(state["master"]))
        _settle(p)
        random = self.moments == "8bit" or (p.dtype == torch.bfloat16 and "master" not in state)
        return Slice(
            param=local(p),
            grad=local(grad).contiguous(),
            exp_avg=local(state["exp_avg"]),
            exp_avg_sq=local(state["exp_avg_sq"]),
            step=step,
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            master=local(state["master"]) if "master" in state else None,
            exp_avg_absmax=own_maxima(state, "exp_avg_absmax", p),
            exp_avg_sq_absmax=own_maxima(state, "exp_avg_sq_absmax", p),
            weight=weight,
            index=index,
            axis=axis,
            key=rounding_key(self.seed, ordinal, step) if random else 0,
        )


def _is_loaded(p: Tensor) -> bool:
    """Whether the model has loaded other values into a slice since its last step."""
    return getattr(getattr(p, "slice_of", None), "loaded", False)


def _settle(p: Tensor) -> None:
    """The slice and its master agree: the master has followed, or was loaded itself."""
    if _is_loaded(p):
        p.slice_of.loaded = False


@torch.no_grad()
def write_back(params) -> None:
    """Write each slice (a parameter with `slice_of`) into its weight; parameters without it are left alone."""
    for p in params:
        weight, index, axis = getattr(p, "slice_of", (None, None, 0))
        if weight is not None:
            scatter(p.detach(), weight.detach(), index, axis)


@torch.no_grad()
def clip_factor(params, max_norm: float) -> tuple[Tensor, Tensor]:
    """(factor, norm) of the gradients as device tensors: `step(grad_scale=factor)` is clip_grad_norm_(…, max_norm).

    The gradients themselves stay as they are, and nothing waits for the device.
    """
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).float(), norm
