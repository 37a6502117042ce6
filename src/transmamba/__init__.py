"""transmamba: one language model that is a Transformer first and a state space after, and the road there from a
Transformer.

    from transmamba import TransMambaConfig, TransMambaForCausalLM, TransPointSchedule

Importing it registers the models with transformers' Auto classes. The command `transmamba` loads them only when a verb
needs them.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .conversion import convert
    from .errors import TransMambaError
    from .memory import keep_freed_memory
    from .models import TransMambaConfig, TransMambaForCausalLM, TransMambaModel
    from .modules import TransMambaCache
    from .schedule import TransPointSchedule

_HOMES = {
    "TransMambaCache": "modules",
    "TransMambaConfig": "models",
    "TransMambaError": "errors",
    "TransMambaForCausalLM": "models",
    "TransMambaModel": "models",
    "TransPointSchedule": "schedule",
    "convert": "conversion",
    "keep_freed_memory": "memory",
}

__all__ = [
    "TransMambaCache",
    "TransMambaConfig",
    "TransMambaError",
    "TransMambaForCausalLM",
    "TransMambaModel",
    "TransPointSchedule",
    "__version__",
    "convert",
    "keep_freed_memory",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'transmamba' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


# The console script answers --help without torch; everyone else gets the Auto classes by importing us.
if Path(sys.argv[0] if sys.argv else "").stem != "transmamba":
    importlib.import_module(".models", __name__)
