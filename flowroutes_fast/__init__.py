"""Information flow routes of a language model, from one forward pass, fast enough to leave on.

The names below are imported when they are first used, so that ``import flowroutes_fast`` takes no time.
"""

from importlib import import_module

from flowroutes_fast.version import __version__

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes longer than all of this
if TYPE_CHECKING:
    from flowroutes_fast import ops
    from flowroutes_fast.corpora import Corpus, corpus, corpus_on_ray, open_corpus
    from flowroutes_fast.experiments import templates
    from flowroutes_fast.experiments.patching import patching
    from flowroutes_fast.loading.load import load
    from flowroutes_fast.loading.streaming import open_streaming
    from flowroutes_fast.planning.estimate import Estimate, estimate
    from flowroutes_fast.results.contrast import contrast, head_frequencies
    from flowroutes_fast.results.route import Route, load_route
    from flowroutes_fast.results.trace import Trace, load_trace
    from flowroutes_fast.system.errors import DamagedFile
    from flowroutes_fast.tracing.trace import trace

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
    "Corpus": "corpora",
    "DamagedFile": "system.errors",
    "Estimate": "planning.estimate",
    "Route": "results.route",
    "Trace": "results.trace",
    "contrast": "results.contrast",
    "corpus": "corpora",
    "corpus_on_ray": "corpora",
    "estimate": "planning.estimate",
    "head_frequencies": "results.contrast",
    "load": "loading.load",
    "load_route": "results.route",
    "load_trace": "results.trace",
    "open_corpus": "corpora",
    "open_streaming": "loading.streaming",
    "patching": "experiments.patching",
    "trace": "tracing.trace",
}
_MODULES = {  # modules under a short name
    "ablation": "experiments.ablation",
    "faithfulness": "experiments.faithfulness",
    "reference": "ops.reference",
    "streaming": "loading.streaming",
    "templates": "experiments.templates",
}


def __getattr__(name: str) -> object:
    """A public name, or a module of this package, imported now."""
    if name.startswith("__"):  # asked for by tools; no module of ours
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    home = f"{__name__}.{_MODULES.get(name, name)}"
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
