"""Every method: what a run's can be, and each by its name."""

from .adapter import Adapter
from .adapter_lora import AdapterLora
from .base import Base
from .caneft import Caneft
from .dora import Dora
from .few_shot import FewShot
from .full import Full
from .given import Given
from .landermt import Landermt
from .lape import Lape
from .layers import Layers
from .lg import Lg
from .llama_pro import LlamaPro
from .lora import Lora
from .lora_mlp import LoraMlp
from .ls import Ls
from .rcn import Rcn

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
