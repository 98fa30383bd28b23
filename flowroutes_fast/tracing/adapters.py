"""Models of other libraries, and the file of :mod:`flowroutes_fast.integrations` that traces each; none is imported
before it is needed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

# where a model's class comes from -> adapter
FOREIGN = {"transformer_lens": "transformer_lens", "nnsight": "nnsight", "nnterp": "nnsight"}


def adapter_of(model: Any) -> ModuleType | None:
    """The file here that traces another library's model (its ``trace`` has :func:`flowroutes_fast.trace`'s
    signature), or None.
    """
    for kind in type(model).__mro__:
        if (name := FOREIGN.get(kind.__module__.partition(".")[0])) is not None:
            return importlib.import_module(f"flowroutes_fast.integrations.{name}")
    return None
