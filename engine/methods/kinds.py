"""Every method: what a run's can be, and each by its name."""

from __future__ import annotations

from typing import Any

from ..common.errors import UserError
from ..common.settings import tuples
from .adapter import Adapter, AdapterLora
from .base import Base, Full
from .caneft.settings import Caneft, Rcn
from .few_shot import FewShot
from .given import Given
from .landermt.settings import Landermt, Layers, Lg, Ls
from .lape import Lape
from .llama_pro import LlamaPro
from .lora import Dora, Lora, LoraMlp
from .method import Method

AnyMethod = (
    Base
    | FewShot
    | Full
    | Lora
    | LoraMlp
    | Dora
    | Adapter
    | AdapterLora
    | LlamaPro
    | Lape
    | Rcn
    | Caneft
    | Given
    | Landermt
    | Layers
    | Ls
    | Lg
)
"""Which of them a run is, its recipe says; flags then set that method's fields."""

METHODS = {method.kind: method for method in AnyMethod.__args__}
"""Each by its `kind`, as config.json and results.json have it."""


def method_from(stored: dict[str, Any]) -> Method:
    """The method that `as_dict` made plain. Raises UserError for one that this version does not know."""
    fields = tuples(stored)
    name = fields.pop("kind", None)
    kind = METHODS.get(str(name))
    if kind is None:
        raise UserError(f"method {name!r} is unknown: this run is of another version")
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"method {name}: {error}: this run is of another version") from None
