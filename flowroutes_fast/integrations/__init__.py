"""Other libraries that use this engine, one file each; none is imported before it is needed."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType


def require(module: str, extra: str, *, package: str | None = None, at_least: str = "", below: str = "") -> ModuleType:
    """Import another library; ``ImportError`` in one sentence if it is missing or its version is not supported.

    Args:
        module: what to import. package: its name on PyPI, if it differs. extra: ours that installs it.
        at_least, below: supported versions, from the first (inclusive) to the second (exclusive).
    """
    from packaging.version import Version

    name = package or module.replace("_", "-")
    wanted = name + ",".join(part for part in (at_least and f">={at_least}", below and f"<{below}") if part)
    advice = f"pip install 'flowroutes-fast[{extra}]' (or pip install '{wanted}')"
    try:
        found = Version(version(name))
    except PackageNotFoundError:
        raise ImportError(f"{name} is not installed: {advice}") from None
    if (at_least and found < Version(at_least)) or (below and found >= Version(below)):
        raise ImportError(f"{name} {found} is not supported: {advice}")
    return importlib.import_module(module)
