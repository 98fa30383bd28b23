"""Information flow routes of a language model, from one forward pass, fast enough to leave on."""

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
from flowroutes_fast.version import __version__

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
