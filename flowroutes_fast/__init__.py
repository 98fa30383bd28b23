"""Information flow routes of a language model, from one forward pass, fast enough to leave on.

The names below are imported when they are first used, so that ``import flowroutes_fast`` takes no time.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

from flowroutes_fast.version import __version__

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes longer than all of this
if TYPE_CHECKING:
    from flowroutes_fast import ops
    from flowroutes_fast.corpora import Corpus, corpus, corpus_on_ray, open_corpus
    from flowroutes_fast.experiments import ablation as ablation
    from flowroutes_fast.experiments import faithfulness as faithfulness
    from flowroutes_fast.experiments import templates
    from flowroutes_fast.experiments.patching import patching
    from flowroutes_fast.loading import streaming as streaming
    from flowroutes_fast.loading.load import load
    from flowroutes_fast.loading.streaming import open_streaming
    from flowroutes_fast.ops import reference as reference
    from flowroutes_fast.planning.estimate import Estimate, estimate
    from flowroutes_fast.results.contrast import contrast, head_frequencies
    from flowroutes_fast.results.route import Route, load_route
    from flowroutes_fast.results.trace import Trace, load_trace
    from flowroutes_fast.system.errors import DamagedFile
    from flowroutes_fast.tracing.generation import generate
    from flowroutes_fast.tracing.options import Options
    from flowroutes_fast.tracing.routes import route
    from flowroutes_fast.tracing.trace import trace

__all__ = [
    "Corpus",
    "DamagedFile",
    "Estimate",
    "Options",
    "Route",
    "Trace",
    "__version__",
    "contrast",
    "corpus",
    "corpus_on_ray",
    "estimate",
    "generate",
    "head_frequencies",
    "load",
    "load_route",
    "load_trace",
    "open_corpus",
    "open_streaming",
    "ops",
    "patching",
    "route",
    "templates",
    "trace",
]

_HOMES = {  # name -> the module that has it
    "Corpus": "corpora",
    "DamagedFile": "system.errors",
    "Estimate": "planning.estimate",
    "Options": "tracing.options",
    "Route": "results.route",
    "Trace": "results.trace",
    "contrast": "results.contrast",
    "corpus": "corpora",
    "corpus_on_ray": "corpora",
    "estimate": "planning.estimate",
    "generate": "tracing.generation",
    "head_frequencies": "results.contrast",
    "load": "loading.load",
    "load_route": "results.route",
    "load_trace": "results.trace",
    "open_corpus": "corpora",
    "open_streaming": "loading.streaming",
    "patching": "experiments.patching",
    "route": "tracing.routes",
    "trace": "tracing.trace",
}
_MODULES = {  # modules that are imported under another path too: the one they had before
    f"{__name__}.{name}": f"{__name__}.{home}"
    for name, home in {
        "ablation": "experiments.ablation",
        "bounds": "ops.bounds",
        "certify": "ops.certified",
        "errors": "system.errors",
        "faithfulness": "experiments.faithfulness",
        "record": "results.trace",
        "reference": "ops.reference",
        "routes": "results.route",
        "streaming": "loading.streaming",
        "templates": "experiments.templates",
    }.items()
}


class _OtherPaths:
    """Finds and loads the modules of :data:`_MODULES`: the same module under both paths, not a copy."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, _OtherPaths) if name in _MODULES else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_MODULES[module.__name__])


sys.meta_path.append(_OtherPaths)  # type: ignore[arg-type]


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
