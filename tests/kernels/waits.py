"""Where the host would wait for a GPU, found on a CPU: operations that read a tensor on the host, by who asks.

    with Waits() as waits:
        step()
    waits.ours      # {"guard.FiniteWatch.check tolist": 1}: slicetune's own
    waits.others    # {"transformers.masking_utils.… _local_scalar_dense": 1}: of a library that it calls
    waits.operations["index_copy_"]     # all operations, by name

Not seen: `.to` between devices, which are all one here.
"""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The size of what they give is in the data, or the data itself is wanted on the host.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
READS |= {"bincount", "equal", "repeat_interleave"}
METHODS = ("tolist", "cpu", "numpy")  # of a tensor on the CPU torch does these without an operation
PASSED_OVER = ("torch", "waits", "contextlib", "fake_gpu")


class Waits(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.methods: dict = {}

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = operation.overloadpacket.__name__
        self.operations[name] += 1
        if _reads(name, arguments, keywords):
            self._count(name)
        return operation(*arguments, **keywords)

    def __enter__(self):
        for name in METHODS:
            self.methods[name] = method = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(name, method))
        return super().__enter__()

    def __exit__(self, *raised) -> None:
        super().__exit__(*raised)
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)

    def _counted(self, name: str, method):
        def call(tensor, *arguments, **keywords):
            self._count(name)
            return method(tensor, *arguments, **keywords)

        return call

    def _count(self, what: str) -> None:
        """For the innermost function outside torch."""
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].split(".")[0] in PASSED_OVER:
            frame = frame.f_back
        module = frame.f_globals["__name__"]
        found = self.ours if module.startswith("slicetune.") else self.others
        found[f"{module.removeprefix('slicetune.')}.{frame.f_code.co_qualname} {what}"] += 1


def _reads(name: str, arguments: tuple, keywords: dict) -> bool:
    if name in ("index", "index_put", "index_put_"):  # by a mask: how many elements is in the data
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in arguments[1])
    if name == "repeat_interleave":
        return keywords.get("output_size") is None
    return name in READS
