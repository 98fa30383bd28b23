"""The tables of a corpus run: one Parquet file per window, checked column by column whenever it is read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.corpora.state import SLACK, State, Stored, read_bytes, write_bytes
from flowroutes_fast.results.edges import KINDS
from flowroutes_fast.system.errors import DamagedFile

LARGEST = 2**31 - 1
SHARE = (0, 1 + SLACK)  # of importance


def columns_of(name: str, state: State) -> dict[str, tuple[str, float, float]]:
    """Per column of a table its type (``"vector"``: float32, one per component) and the smallest and largest value."""
    s = state.settings
    layers, heads = s["shape"]
    texts, longest = state.progress.texts, s["max_tokens"] - 1
    key: dict[str, tuple[str, float, float]] = {"number": ("int64", 0, texts - 1), "piece": ("int32", 0, LARGEST)}
    return {
        "texts": key
        | {
            "piece": ("int64", 0, LARGEST),
            "domain": ("string", 0, 0),
            "text": ("string", 0, 0),
            "tokens": ("int64", 1, longest + 1),
        }
        | ({} if s["routes_only"] else {"mean": ("vector", *SHARE)}),
        "positions": key
        | {
            "position": ("int32", 0, longest),
            "token_id": ("int32", 0, LARGEST),
            "begin": ("int32", 0, LARGEST),
            "end": ("int32", 0, LARGEST),
            "word": ("int32", -1, LARGEST),
            "received": ("float", 0, layers * (1 + SLACK)),
            "components": ("vector", *SHARE),
        },
        "edges": {
            "layer": ("int64", 0, layers - 1),
            "kind": ("string", 0, 0),
            "source": ("int64", 0, longest),
            "target": ("int64", 0, longest),
            "head": ("int64", -1, heads - 1),
            "importance": ("double", *SHARE),
        }
        | key,
    }[name]


def write_table(path: Path, table: pd.DataFrame) -> Stored:
    """Write a table; columns of arrays become lists of a fixed size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for name in table.columns:
        first = table[name].iloc[0]
        if isinstance(first, np.ndarray):
            flat = pa.array(np.concatenate(table[name].to_list()))
            columns[str(name)] = pa.FixedSizeListArray.from_arrays(flat, len(first))
        else:
            columns[str(name)] = pa.array(table[name])
    raw = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), raw, compression="zstd")
    return write_bytes(path, raw.getvalue().to_pybytes(), len(table))


def read_table(path: Path, name: str, state: State, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """One window's part of the table ``name``, or some of its columns.

    Raises:
        DamagedFile: the file is missing, not the one that was written, or holds what this run cannot have written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = state.files[path.name] if state.files is not None else None
    raw = read_bytes(path, known)
    try:
        with pq.ParquetFile(io.BytesIO(raw)) as file:
            wanted, (layers, heads) = columns_of(name, state), state.settings["shape"]
            wrong = _wrong_schema(file.schema_arrow, wanted, layers * heads + layers)
            if not wrong and known is not None and file.metadata.num_rows != known.rows:
                wrong = f"it has {file.metadata.num_rows} rows, {known.rows} were written"
            if not wrong:
                found = file.read(columns=list(columns) if columns else None)
                wrong = _wrong_values(found, wanted)
            if not wrong:
                return found.to_pandas()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedFile(f"'{path}' is damaged: {str(error).splitlines()[0] if str(error) else error}") from error
    raise DamagedFile(f"'{path}' is damaged: {wrong}")


def _wrong_schema(schema: Any, wanted: dict[str, tuple[str, float, float]], components: int) -> str:
    """What is wrong with a table's columns; empty if nothing is."""
    if schema.names != list(wanted):
        return f"its columns are {', '.join(schema.names)}, not {', '.join(wanted)}"
    types = {"vector": (f"fixed_size_list<element: float>[{components}]",), "string": ("string", "large_string")}
    for name, (kind, _, _) in wanted.items():
        if str(schema.field(name).type) not in types.get(kind, (kind,)):
            return f"column {name!r} is of type {schema.field(name).type}"
    return ""


def _wrong_values(table: Any, wanted: dict[str, tuple[str, float, float]]) -> str:
    """What is wrong with a table's values; empty if nothing is."""
    for name in table.column_names:
        kind, low, high = wanted[name]
        column = table.column(name).combine_chunks()
        if column.null_count:
            return f"column {name!r} has {column.null_count} empty values"
        if kind == "string":
            if name == "kind" and (unknown := set(column.unique().to_pylist()) - set(KINDS)):
                return f"column 'kind' has {min(unknown)!r}"
            continue
        if kind == "vector":
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        # also of NaN
        if len(values) and not (
            values.min() >= low - (SLACK if values.dtype.kind == "f" else 0) and values.max() <= high
        ):
            return f"column {name!r} leaves [{low}, {high:g}]"
    return ""
