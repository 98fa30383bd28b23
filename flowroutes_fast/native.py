"""The native extension, imported on first use; why it is missing is remembered and told to whoever asks."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return ``(extension, None)`` or ``(None, reason)``."""
    import torch  # noqa: F401  its OpenMP runtime must be in the process first: one thread pool, not two that spin against each other

    try:
        _native = importlib.import_module("flowroutes_fast._native")
    except ImportError as error:
        return None, (
            f"the native extension cannot be imported ({error}); install a C++17 compiler and run "
            "'pip install --force-reinstall --no-deps flowroutes_fast' (or 'pip install -e .' in a checkout)"
        )
    return _native, None


def extension() -> ModuleType:
    """Return the extension or raise ``RuntimeError`` with the reason why it is missing."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module
