"""What methods of traces and routes call in packages above this one: pages, text, experiments. Looked up when they
are called.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOMES = {  # name -> module of flowroutes_fast
    "details": "view.details",
    "route_cell": "view.notebook",
    "route_html": "view.html",
    "route_text": "view.text",
    "trace_cell": "view.notebook",
    "trace_html": "view.page",
    "verify": "experiments.faithfulness",
    "write_graph": "integrations.circuit_tracer",
}


def from_above(name: str) -> Any:
    """The function of this name; ``KeyError`` for one that the table does not hold."""
    return getattr(import_module(f"flowroutes_fast.{HOMES[name]}"), name)
