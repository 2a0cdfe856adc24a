"""An H100 that is not there: Triton's own JIT compiles for it, and nothing is launched.

    gpu = fake_gpu.install()                    # after all imports: tensors on the CPU take the kernels' path
    gpu = fake_gpu.install(compiles=False)      # only counts what would be compiled
    gpu.launches, gpu.compiled, gpu.uploads     # what has happened since

What a kernel would have written stays as it was allocated, so no number means anything; `zeros` makes it zero. It
changes the whole process: programs (launches_….py) use it, and test_launches.py runs them.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

H100 = GPUTarget("cuda", 90, 32)
SHARED = 232_448  # bytes that a block may have
GRID = (2**31 - 1, 65_535, 65_535)

USED = (
    "triton.backends.compiler:GPUTarget",
    "triton.runtime:driver.set_active",
    "triton.compiler:compile",
    "triton.compiler:CompiledKernel.run",
    "triton.compiler:CompiledKernel.launch_metadata",
    "triton.compiler:ASTSource",
    "triton.runtime.jit:JITFunction.create_binder",
)
"""What of Triton is used here and not documented; test_launches.py looks whether all of it is there."""


@dataclass
class FakeGPU:
    """What Triton asks of a driver, and the records."""

    compiles: bool
    launches: list[str] = field(default_factory=list)
    """The kernel of each launch."""
    compiled: list[str] = field(default_factory=list)
    """Each kernel that was compiled, with the types, alignments and constants that it was compiled for."""
    uploads: int = 0
    """Tables that were copied to the device by dispatch.upload."""

    def __post_init__(self) -> None:
        limits = {"max_shared_mem": SHARED}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits,
            load_binary=lambda name, binary, shared, device: (object(), 0, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata) -> Callable:
        """What a kernel is launched by: takes the grid and all arguments."""

        def launch(x: int, y: int, z: int, *arguments: object) -> None:
            grid = x, y, z
            assert all(0 < size <= most for size, most in zip(grid, GRID, strict=True)), (source.fn.__name__, grid)
            self.launches.append(source.fn.__name__)

        return launch

    def begin(self) -> None:
        """Count launches and uploads from here on."""
        self.launches, self.uploads = [], 0

    def counts(self) -> dict[str, int]:
        return dict(Counter(self.launches))


class NotCompiled:
    """Takes a compiled kernel's place."""

    function = packed_metadata = None

    def __init__(self, run: Callable) -> None:
        self.run = run

    def launch_metadata(self, *arguments: object) -> None:
        return None


def install(compiles: bool = True) -> FakeGPU:
    """Make it Triton's GPU, and slicetune's for every tensor but float64 ones."""
    gpu = FakeGPU(compiles)
    driver.set_active(gpu)
    build = triton.compiler.compile

    def recorded(source, target, options):
        gpu.compiled.append(f"{source.fn.__name__} {source.signature} {source.attrs} {source.constants}")
        if not compiles:
            return NotCompiled(gpu.launcher_cls(source, None))
        return build(source, target=target, options=options)

    triton.compiler.compile = recorded
    _redirect(gpu)
    return gpu


def _redirect(gpu: FakeGPU) -> None:
    """Dispatch, and every module that has taken these names from it."""
    from slicetune.kernels.common import dispatch

    upload = dispatch.upload

    def counted(*arguments: object) -> torch.Tensor:
        gpu.uploads += 1
        return upload(*arguments)

    new = {
        "use_triton": lambda tensor: tensor.dtype != torch.float64,
        "architecture": lambda tensor: "sm_90",
        "upload": counted,
        "is_in_torch_dispatch_mode": lambda: False,  # ops run as outside of a mode: waits.py sees what is in them
    }
    old = {name: getattr(dispatch, name) for name in new}
    modules = [module for name, module in sys.modules.items() if name.startswith("slicetune.")]
    for module in modules:
        for name, function in new.items():
            if vars(module).get(name) is old[name]:
                setattr(module, name, function)


def zeros() -> None:
    """Memory that no kernel has written is zero, so that losses are finite."""
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros


def without_products() -> torch.library.Library:
    """Products of matrices and attention give zeros at once, for as long as the result is held.

    They take nearly all of a CPU's time, and their values mean as little as all others.
    """
    products = {
        "mm": lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
        "addmm": lambda c, a, b, **scales: a.new_zeros(a.shape[0], b.shape[1]),
        "addmm_": lambda c, a, b, **scales: c,
        "bmm": lambda a, b: a.new_zeros(*a.shape[:2], b.shape[2]),
        "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *rest, **more: (
            torch.zeros_like(q), q.new_zeros(q.shape[:-1], dtype=torch.float32)
        ),
        "_scaled_dot_product_flash_attention_for_cpu_backward": lambda dy, q, k, v, *rest, **more: tuple(
            map(torch.zeros_like, (q, k, v))
        ),
    }  # fmt: skip
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces torch's own
        for name, product in products.items():
            library.impl(name, product, "CPU")
    return library
