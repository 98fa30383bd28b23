"""A corpus run whose windows are traced by workers on one or many machines (Ray Data, the ``ray`` extra)."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from flowroutes_fast.capture.hooks import unwrap
from flowroutes_fast.corpora.run import Row, Settings, Window, run, settings_of, trace_items
from flowroutes_fast.corpora.state import NOT_OF_A_CORPUS
from flowroutes_fast.models.identity import config_digest, weights_digest
from flowroutes_fast.tracing.options import taken

Load = str | os.PathLike[str] | Callable[[], tuple[Any, Any]]
LARGEST = 2**31 - 1  # bytes of one Arrow value


def corpus_on_ray(
    load: Load,
    texts: Any,
    out: str | os.PathLike[str],
    *,
    workers: int = 2,
    cpus: float = 1,
    gpus: float = 0,
    address: str | None = None,
    field: str = "text",
    split: str = "file",
    progress: bool = False,
    **options: Any,
) -> Any:
    """:func:`flowroutes_fast.corpus` with a pool of Ray actors: the same folder, the same rows, the same sums.

    The process that calls this reads and cuts the texts and writes all files, windows in their order; workers trace
    windows. A worker that dies is started again and its window traced again; if this process dies, the same call goes
    on after the last window that was written (so does :func:`flowroutes_fast.corpus`, and the other way round).

    Args:
        load: a name or path that :func:`flowroutes_fast.load` opens on every worker's machine, or a function that
            returns (model, tokenizer) there.
        workers: actors, each with ``cpus`` processors (as many threads) and ``gpus`` GPUs; a model on a GPU is moved
            there by ``load`` itself.
        address: of a running cluster, ``"auto"`` included; None for this machine, or for what ``ray.init`` was told
            before.
        texts, out, field, split, progress, options: as for :func:`flowroutes_fast.corpus`.

    Raises:
        ModuleNotFoundError: Ray is not installed. RuntimeError: a worker failed by an error of its own, or the cluster
            never had the processors
        asked for. ValueError, OSError: as for :func:`flowroutes_fast.corpus`.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a corpus on several workers needs Ray; run: pip install 'flowroutes_fast[ray]'"
        ) from error
    if workers < 1 or cpus <= 0 or gpus < 0:
        raise ValueError(
            f"workers must be at least 1, cpus above 0 and gpus not negative, got {workers}, {cpus} and {gpus}"
        )
    taken(
        {name: value for name, value in options.items() if name not in DEFAULTS},
        "corpus_on_ray",
        NOT_OF_A_CORPUS,
        DEFAULTS,
    )
    mine = not ray.is_initialized()
    if mine:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        _fits(ray.cluster_resources(), workers, cpus, gpus)
        about = ray.remote(_about).options(num_cpus=cpus, num_gpus=gpus)
        settings, tokenizer = ray.get(about.remote(load, DEFAULTS | options))
        if settings is None:
            raise TypeError("a corpus of texts needs a tokenizer")

        def rows(windows: Iterator[Window], bar: Any) -> Iterator[tuple[Window, list[Row]]]:
            return _traced(windows, bar, load, settings, workers, cpus, gpus)

        return run(settings, tokenizer, texts, out, rows, field=field, split=split, progress=progress)
    except ray.exceptions.RayError as error:
        # by the worker itself, before what Ray says of it
        raised = re.search(r"^[\w.]+(?:Error|Exception): .*$", str(error), re.MULTILINE)
        raise RuntimeError(f"a worker failed: {raised[0] if raised else error}") from error
    finally:
        if mine:
            ray.shutdown()


DEFAULTS: dict[str, Any] = {
    "threshold": 0.04,
    "max_tokens": None,
    "overflow": "truncate",
    "window": 256,
    "batch_tokens": 2048,
    "positions": None,
    "edges": True,
    "routes_only": False,
    "shard": (0, 1),
}


def _fits(there: dict[str, float], workers: int, cpus: float, gpus: float) -> None:
    """Ray would wait for ever for processors that no machine has."""
    for name, each, unit in (("CPU", cpus, "processors"), ("GPU", gpus, "GPUs")):
        if workers * each > there.get(name, 0) + 1e-9:
            raise RuntimeError(
                f"{workers} workers need {workers * each:g} {unit}, and the cluster has {there.get(name, 0):g}"
            )


def _open(load: Load) -> tuple[Any, Any]:
    from flowroutes_fast.loading.load import load as open_model

    return load() if callable(load) else open_model(load)


def _about(load: Load, options: dict[str, Any]) -> tuple[Settings | None, Any]:
    model, tokenizer = _open(load)
    model = unwrap(model)
    return None if tokenizer is None else settings_of(model, tokenizer, **options), tokenizer


class Worker:
    """An actor: a model, and windows to trace."""

    def __init__(self, load: Load, settings: Settings, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model, self.settings = unwrap(_open(load)[0]), settings
        if (weights_digest(self.model), config_digest(self.model)) != (settings.weights, settings.config):
            raise ValueError(
                "a worker's model is not the one that the run began with: is another checkpoint at its "
                "path on this machine?"
            )

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        found = [
            pickle.dumps(trace_items(self.model, pickle.loads(one.as_py()), self.settings), protocol=5)
            for one in batch["items"]
        ]
        if (largest := max(map(len, found))) > LARGEST:
            raise ValueError(
                f"the rows of {self.settings.window} texts take {largest / 1e9:.1f} GB: choose a smaller window"
            )
        return pa.table({"rows": pa.array(found, pa.large_binary())})


def _traced(
    windows: Iterator[Window], bar: Any, load: Load, settings: Settings, workers: int, cpus: float, gpus: float
) -> Iterator[tuple[Window, list[Row]]]:
    """Texts wait in Ray's object store, which spills to disk; the driver holds one window's rows at a time."""
    import pyarrow as pa
    import ray

    left, blocks = [], []
    for window in windows:
        blocks.append(
            ray.put(pa.table({"items": pa.array([pickle.dumps(window.items, protocol=5)], pa.large_binary())}))
        )
        left.append(replace(window, items=[]))
    if not left:
        return
    data = ray.data.from_arrow_refs(blocks)  # type: ignore[arg-type]
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    threads = max(int(cpus), 1)
    found = data.map_batches(
        Worker,
        fn_constructor_args=(load, settings, threads),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(left)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for window, row in zip(left, found.iter_rows(), strict=True):
        rows = pickle.loads(row["rows"])
        bar.update(sum(r["tokens"] for r in rows))
        yield window, rows
