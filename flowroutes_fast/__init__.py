"""Information flow routes of a language model, from one forward pass, fast enough to leave on.

The names below are imported when they are first used, so that ``import flowroutes_fast`` takes no time.
"""

import sys
from importlib import import_module
from types import ModuleType

from flowroutes_fast.version import __version__

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes longer than all of this
if TYPE_CHECKING:
    from flowroutes_fast import ops, templates
    from flowroutes_fast.contrast import contrast, head_frequencies
    from flowroutes_fast.corpus import Corpus, corpus, corpus_on_ray, open_corpus
    from flowroutes_fast.errors import DamagedFile
    from flowroutes_fast.estimate import Estimate, estimate
    from flowroutes_fast.load import load
    from flowroutes_fast.patching import patching
    from flowroutes_fast.record import Trace, load_trace
    from flowroutes_fast.routes import Route, load_route
    from flowroutes_fast.streaming import open_streaming
    from flowroutes_fast.trace import trace

__all__ = [
    "Corpus",
    "DamagedFile",
    "Estimate",
    "Route",
    "Trace",
    "__version__",
    "contrast",
    "corpus",
    "corpus_on_ray",
    "estimate",
    "head_frequencies",
    "load",
    "load_route",
    "load_trace",
    "open_corpus",
    "open_streaming",
    "ops",
    "patching",
    "templates",
    "trace",
]

_HOMES = {  # name -> the module that has it
    "Corpus": "corpus",
    "DamagedFile": "errors",
    "Estimate": "estimate",
    "Route": "routes",
    "Trace": "record",
    "contrast": "contrast",
    "corpus": "corpus",
    "corpus_on_ray": "corpus",
    "estimate": "estimate",
    "head_frequencies": "contrast",
    "load": "load",
    "load_route": "routes",
    "load_trace": "record",
    "open_corpus": "corpus",
    "open_streaming": "streaming",
    "patching": "patching",
    "trace": "trace",
}


class _Package(ModuleType):
    """This package. Importing ``flowroutes_fast.trace`` does not put the module in the place of the function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """A public name, or a module of this package, imported now."""
    if name.startswith("__"):  # asked for by tools; no module of ours
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
