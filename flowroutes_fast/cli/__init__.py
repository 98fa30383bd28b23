"""The command line: ``flowroutes trace``, ``view``, ``estimate``, ``corpus``, ``analyze``, ``bench``, ``models``
and ``doctor``.
"""

# ruff: noqa: E402  (an interrupt is watched for before what takes long to import)
from __future__ import annotations

from flowroutes_fast.cli import interrupt

interrupt.leave_at_once()

import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flowroutes_fast.cli import terminal
from flowroutes_fast.cli.terminal import examples

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
Chat = Annotated[bool, typer.Option("--chat", help="The text is a chat message: the tokenizer's template is applied.")]
Json = Annotated[bool, typer.Option("--json", help=terminal.JSON_HELP)]


def _version(asked: bool) -> None:
    if asked:
        from flowroutes_fast.version import __version__

        typer.echo(f"flowroutes_fast {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        'flowroutes trace "The capital of France is"',
        "flowroutes COMMAND --help",
        "flowroutes --install-completion",
    )
    + f"\n\n{terminal.EXIT_CODES}"
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """See how information flows through a language model to one of its predictions, from a single forward pass."""


@app.command(
    epilog=examples(
        'flowroutes trace "The capital of France is" --threshold 0.04 --out out/capital',
        'flowroutes trace "Paris is in" --model ./my-checkpoint --measure signed',
        'flowroutes trace "Paris is in" --rule flow --keep 0.05',
        'flowroutes trace "Paris is in" --model big.gguf --memory 8GiB --resume run',
        'flowroutes trace "Paris is in" --json | jq .prediction',
    )
)
def trace(
    text: Annotated[str, typer.Argument(help="The prompt to explain.")],
    model: Annotated[
        str, typer.Option(help="'demo', a local folder, a .gguf file or a hub id.", autocompletion=terminal.models)
    ] = "demo",
    position: Annotated[
        list[int] | None,
        typer.Option(
            help="Token position whose prediction is explained; negative from the end. May be repeated. \\[default: -1]"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Edges above this importance (--rule flow: flow) are followed. \\[default: 0.04 without --keep]"
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="'importance' (each edge on its own) or 'flow' (what the edge carries to the root).",
            autocompletion=terminal.one_of("importance", "flow"),
        ),
    ] = "importance",
    keep: Annotated[
        float | None, typer.Option(help="With --rule flow, instead of a threshold: share of the edges to keep.")
    ] = None,
    renormalize: Annotated[
        bool, typer.Option(help="Drop sub-edges below the threshold before heads are summed.")
    ] = True,
    floor: Annotated[float | None, typer.Option(help=terminal.FLOOR_HELP)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for route.html, route.json and trace.safetensors (for 'flowroutes view')."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="'auto', 'cpu', 'triton', 'cuda' or 'reference'.", autocompletion=terminal.backends)
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="'certified' or 'exact'.", autocompletion=terminal.one_of("certified", "exact"))
    ] = "certified",
    measure: Annotated[
        str, typer.Option(help="'proximity' or 'signed'.", autocompletion=terminal.one_of("proximity", "signed"))
    ] = "proximity",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Leave the weights on disk and read them while running: most memory they may take, like 8GiB."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A new folder that keeps every finished layer; the same command after a kill goes on from there."
        ),
    ] = None,
    chat: Chat = False,
    json: Json = False,
) -> None:
    """Explain a prediction: print the route, and write it as a page and as JSON.

    Without --out only the rows that the route reaches are evaluated.
    """
    if threshold is None and keep is None:
        threshold = 0.04
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    if not text:
        raise ValueError("the text is empty: there is nothing to trace")
    floor = terminal.floor_of(floor, threshold if rule == "importance" else None, precision)
    fr = _package()
    from flowroutes_fast.system.files import check_writable
    from flowroutes_fast.tracing.options import DEFAULT_THRESHOLDS
    from flowroutes_fast.tracing.resume import discard

    if out is not None:
        check_writable(out)
    start = time.perf_counter()
    with terminal.busy(f"loading {model}"):
        loaded, tokenizer = fr.load(model) if memory is None else fr.open_streaming(model, memory)
    opened = time.perf_counter()
    wanted = (*([threshold] if threshold is not None and rule == "importance" else []), *DEFAULT_THRESHOLDS)
    lazy = out is None and memory is None and resume is None and precision == "certified" and rule == "importance"
    result = fr.trace(
        loaded,
        tokenizer,
        _messages(text) if chat else text,
        lazy=lazy,
        backend=backend,
        precision=precision,
        measure=measure,
        floor=floor,
        thresholds=wanted,
        progress=terminal.progress_wanted(),
        resume=resume,
    )
    route = result.route(position or -1, threshold, renormalize, rule=rule, keep=keep)
    extracted = time.perf_counter()
    written = (
        []
        if out is None
        else [route.to_html(out / "route.html"), route.save(out / "route.json"), result.save(out / "trace.safetensors")]
    )
    if json:
        terminal.print_json(
            {
                "model": result.model,
                "tokens": result.tokens,
                "prediction": [{"token": t, "probability": p} for t, p in result.prediction],
                "route": route.to_dict(),
                "certificate": result.certificate,
                "seconds": result.timings,
                "files": written,
            }
        )
    else:
        _report(result, route)
        sizes = (
            f"{len(result.tokens)} tokens · {result.n_layers} layers × {result.n_heads} heads · backend "
            f"{result.backend} · {result.precision}"
        )
        share = result.timings["importances"] / max(result.timings["total"] - result.timings["importances"], 1e-9)
        typer.echo(f"\n{sizes}")
        if lazy:
            rows, every = result.certificate["rows"], result.n_layers * len(result.tokens)
            typer.echo(
                f"loading {opened - start:.1f} s · forward pass {result.timings['total'] * 1e3:.0f} ms · route "
                f"{(extracted - opened - result.timings['total']) * 1e3:.0f} ms, "
                f"for which {rows} of {every} rows were evaluated (--out writes a trace of all)"
            )
            return
        typer.echo(
            f"loading {opened - start:.1f} s · traced forward pass {result.timings['total'] * 1e3:.0f} ms, of which "
            f"importances "
            f"{result.timings['importances'] * 1e3:.0f} ms ({share:.0%} over the plain pass) · in all, with the "
            f"route, {extracted - opened:.2f} s"
        )
        if written:
            terminal.say("wrote " + ", ".join(f"{path} ({path.stat().st_size / 1e3:.0f} kB)" for path in written))
    if resume is not None:  # all that was asked for has been written
        sys.stdout.flush()
        discard(resume)


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _line_of(route: Any, found: Any) -> str:
    """A route in a line: its size, and the strongest edges of heads that bring something from another token."""
    from flowroutes_fast.view.text import show_token

    edges = route.edges
    moved = edges[(edges["kind"] == "attention") & (edges["source"] != edges["target"])].nlargest(3, "importance")
    strongest = "  ".join(
        f"L{row.layer}H{row.head} {show_token(found.tokens[row.source])}@{row.source} {row.importance:.2f}"
        for row in moved.itertuples()
    )
    return f"{len(edges)} sub-edges   {strongest}"


@app.command(
    epilog=examples(
        'flowroutes generate "The capital of France is" --tokens 8',
        'flowroutes generate "What is 12 + 30?" --chat --tokens 30 --out out/answer',
        'flowroutes generate "Once upon" --sample --seed 1 --json | jq .text',
    )
)
def generate(
    text: Annotated[str, typer.Argument(help="The prompt to continue.")],
    model: Annotated[
        str, typer.Option(help="'demo', a local folder, a .gguf file or a hub id.", autocompletion=terminal.models)
    ] = "demo",
    tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 20,
    threshold: Annotated[float, typer.Option(help="Edges above this importance are followed.")] = 0.04,
    renormalize: Annotated[
        bool, typer.Option(help="Drop sub-edges below the threshold before heads are summed.")
    ] = True,
    sample: Annotated[
        bool, typer.Option("--sample/--greedy", help="Sample instead of taking the most probable token.")
    ] = False,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a page of the whole (trace.html) and a trace of all rows.")
    ] = None,
    chat: Chat = False,
    json: Json = False,
) -> None:
    """Generate, and print each token with its route as it appears; Ctrl+C ends with what there is."""
    if not text:
        raise ValueError("the text is empty: there is nothing to continue")
    fr = _package()
    from flowroutes_fast.system.files import check_writable
    from flowroutes_fast.view.text import show_token

    if out is not None:
        check_writable(out)
    with terminal.busy(f"loading {model}"):
        loaded, tokenizer = fr.load(model)
    import torch

    torch.manual_seed(seed)
    running = fr.generate(
        loaded, tokenizer, _messages(text) if chat else text, tokens, threshold, renormalize, do_sample=sample
    )
    steps = []
    with running:
        for token, route in running:
            steps.append({"token": token, "position": route.position, "sub_edges": len(route.edges)})
            if not json:
                typer.echo(f"{show_token(token):>16}  {_line_of(route, running.trace)}")
    written = (
        []
        if out is None
        else [
            running.trace.to_html(out / "trace.html", threshold=threshold),
            running.trace.save(out / "trace.safetensors"),
        ]
    )
    if json:
        terminal.print_json(
            {
                "model": running.trace.model,
                "tokens": running.trace.tokens,
                "text": running.text,
                "steps": steps,
                "files": written,
            }
        )
        return
    rows = running.trace.certificate["rows"]
    typer.echo(
        f"\n{len(steps)} tokens, each with its route · {rows} of {running.trace.n_layers * len(running.trace.tokens)} "
        f"rows evaluated"
    )
    if written:
        terminal.say("wrote " + ", ".join(f"{path} ({path.stat().st_size / 1e3:.0f} kB)" for path in written))


def _package() -> Any:
    """``flowroutes_fast`` and what opens a model, imported: up to here an interrupt ends the process at once, from
    here on it cleans up.
    """
    terminal.check_room()
    import transformers

    import flowroutes_fast as fr

    # transformers imports its parts when they are asked for
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)
    _ = fr.trace
    interrupt.tidily()
    return fr


def _report(result, route) -> None:  # type: ignore[no-untyped-def]
    from rich.text import Text

    from flowroutes_fast.view.text import rule_text, show_token

    for text, probability in result.prediction[:1]:
        terminal.console().print(
            Text.assemble("prediction  ", (repr(text), "bold green"), f" with probability {probability:.2f}")
        )
    typer.echo("tokens      " + " ".join(f"{i}:{show_token(token)}" for i, token in enumerate(result.tokens)) + "\n")
    typer.echo(route.to_text())
    typer.echo(f"\n{len(route.edges)} sub-edges, {len(route.token_edges)} token edges: {rule_text(route)}")


@app.command(
    epilog=examples(
        "flowroutes view out/demo/trace.safetensors",
        "flowroutes view mary.safetensors john.safetensors --model demo --out compared.html",
        "flowroutes view --serve --model demo",
    )
)
def view(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A trace file; a second one to compare with; for each, if there is one, its trace with "
            "the other measure."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page. (default: the first file's name with .html)")] = None,
    open_page: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Show it in a browser. (default: when this is a terminal)")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="'demo', a local folder, a .gguf file or a hub id. Adds what each state predicts (logit lens), where "
            "heads attend and the "
            "signed view; with --serve, the model that traces prompts. (default with --serve: demo)",
            autocompletion=terminal.models,
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Where the slider starts.")] = 0.04,
    position: Annotated[int, typer.Option(help="The root that the page opens with; negative from the end.")] = -1,
    renormalize: Annotated[
        bool, typer.Option(help="Drop sub-edges below the threshold before heads are summed.")
    ] = True,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on 127.0.0.1 and trace prompts that are typed into it.")
    ] = False,
    port: Annotated[int, typer.Option(help="With --serve; 0 takes a free one.")] = 8765,
    max_tokens: Annotated[int | None, typer.Option(help="With --serve: longest prompt. (default: 2048)")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="With --serve: most that the kept states of the last prompts take. (default: 2GiB)"),
    ] = None,
) -> None:
    """Show traces in an interactive page: routes at every threshold, from every token, of two prompts side by side."""
    if serve and out is not None:
        raise ValueError("--out and --serve exclude one another: a served page is no file")
    _package()
    from flowroutes_fast.view import command

    options: dict[str, Any] = {
        "open_page": sys.stdout.isatty() if open_page is None else open_page,
        "threshold": threshold,
        "position": position,
        "renormalize": renormalize,
        "say": terminal.say,
    }
    if serve:
        command.serve(
            files or [],
            port=port,
            model=model or "demo",
            max_tokens=max_tokens,
            memory=memory,
            ready=interrupt.serving,
            **options,
        )
    else:
        command.view(files or [], out=out, model=model, **options)


@app.command(
    epilog=examples(
        "flowroutes estimate meta-llama/Llama-2-7b-hf --tokens 4096 --dtype bfloat16",
        "flowroutes estimate ./llama-3-70b --tokens 64 --memory 8GiB",
        "flowroutes estimate demo --tokens 512 --json | jq .total",
    )
)
def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="'demo', a local folder, a .gguf file or a hub id; its configuration alone is read.",
            autocompletion=terminal.models,
        ),
    ],
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")],
    precision: Annotated[
        str, typer.Option(help="'certified' or 'exact'.", autocompletion=terminal.one_of("certified", "exact"))
    ] = "certified",
    measure: Annotated[
        str, typer.Option(help="'proximity' or 'signed'.", autocompletion=terminal.one_of("proximity", "signed"))
    ] = "proximity",
    backend: Annotated[
        str,
        typer.Option(
            help="'auto', 'cpu', 'triton', 'cuda' or 'reference'; it need not be available here.",
            autocompletion=terminal.backends,
        ),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights, say bfloat16; as loading gives it by default.")
    ] = None,
    neurons: Annotated[bool, typer.Option(help="Also split FFNs into neurons.")] = False,
    batch: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="As for trace: weights stay on disk, this much may be in memory, like 8GiB.")
    ] = None,
    json: Json = False,
) -> None:
    """Peak memory and duration of a trace, before anything is loaded."""
    fr = _package()
    from rich.table import Table

    from flowroutes_fast.planning.estimate import _duration, size_text
    from flowroutes_fast.system.escape import printable

    found = fr.estimate(
        model,
        tokens,
        precision=precision,
        measure=measure,
        backend=backend,
        dtype=dtype,
        neurons=neurons,
        batch=batch,
        memory=memory,
    )
    if json:
        terminal.print_json({**asdict(found), "additional": found.additional, "total": found.total})
        return
    sequences = f" × {batch}" if batch > 1 else ""
    title = f"{found.model}, {tokens} tokens{sequences}, {precision}, {measure}, backend {found.backend}"
    table = Table(title=printable(title), title_justify="left")
    table.add_column("what")
    table.add_column("estimate", justify="right")
    table.add_column("how it is known", overflow="fold")
    for name, size, how in found.rows():
        table.add_row(
            name,
            size_text(size),
            printable(how),
            style="bold" if name == "total" else None,
            end_section=name in ("allocator", "total"),
        )
    table.add_row("time", _duration(found.seconds), found.time_source)
    console = terminal.console()
    console.print(table)
    for note in found.notes:
        console.print(printable(note))


@app.command(
    epilog=examples(
        "flowroutes corpus english=essays/ code=src/ --out run",
        "flowroutes corpus texts.jsonl --field body --overflow split --out run",
        "cat lines.txt | flowroutes corpus - --out run",
        "flowroutes corpus texts.parquet --out run0 --shard 0/4",
        "flowroutes corpus english=essays/ --out routes --routes-only",
    )
)
def corpus(
    texts: Annotated[
        list[str],
        typer.Argument(
            help="Files or folders (text, .jsonl, .parquet), or '-' for lines of standard input; "
            "DOMAIN=PATH names a domain."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the results; that of a killed run, to go on with it.")],
    model: Annotated[
        str, typer.Option(help="'demo', a local folder, a .gguf file or a hub id.", autocompletion=terminal.models)
    ] = "demo",
    threshold: Annotated[
        float, typer.Option(help="Importance above which a sub-edge is active and a route's edges are kept.")
    ] = 0.04,
    precision: Annotated[
        str, typer.Option(help="'certified' or 'exact'.", autocompletion=terminal.one_of("certified", "exact"))
    ] = "certified",
    floor: Annotated[float | None, typer.Option(help=terminal.FLOOR_HELP)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest piece of a text. \\[default: the model's context, at most 1024]")
    ] = None,
    overflow: Annotated[str, typer.Option(help="Longer texts: 'truncate' or 'split' into pieces.")] = "truncate",
    split: Annotated[
        str, typer.Option(help="What of a text file is one text: 'file', 'paragraph' or 'line'.")
    ] = "file",
    field: Annotated[str, typer.Option(help="Where JSONL and Parquet have the text.")] = "text",
    positions: Annotated[
        bool | None,
        typer.Option(help="Write the component vector of every position. \\[default: yes, unless --routes-only]"),
    ] = None,
    edges: Annotated[bool, typer.Option(help="Write the route of every text.")] = True,
    routes_only: Annotated[
        bool, typer.Option("--routes-only", help="Evaluate what the routes reach: no means, no component vectors.")
    ] = False,
    shard: Annotated[str, typer.Option(help="i/K: trace the texts with number ≡ i modulo K alone.")] = "0/1",
    window: Annotated[int, typer.Option(help="Texts that are written at a time.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a batch.")] = 2048,
    memory: Annotated[
        str | None, typer.Option(help="Leave the weights on disk: most memory they may take, like 8GiB.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Trace with so many Ray workers (the extra 'ray'); 0 for this process alone.")
    ] = 0,
    cpus: Annotated[float, typer.Option(help="Processors of each worker.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, or 'auto'. \\[default: this machine]")
    ] = None,
    json: Json = False,
) -> None:
    """Trace many texts: component vectors and routes as Parquet files, means and frequencies per domain."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    floor = terminal.floor_of(floor, threshold, precision)
    fr = _package()
    from flowroutes_fast.corpora.texts import Stream, named_sources

    try:
        index, count = (int(n) for n in shard.split("/"))
    except ValueError:
        raise ValueError(f"--shard must be i/K, like 0/4, got {shard!r}") from None
    if "-" in texts and len(texts) > 1:
        raise ValueError("standard input ('-') cannot be combined with files")
    source: object = Stream(getattr(sys.stdin, "buffer", sys.stdin)) if texts == ["-"] else named_sources(texts)
    for path in (p for paths in source.values() for p in paths) if isinstance(source, dict) else ():
        if not path.exists():
            raise FileNotFoundError(f"no file or folder at '{path}'")
    options: dict[str, Any] = {
        "threshold": threshold,
        "precision": precision,
        "floor": floor,
        "max_tokens": max_tokens,
        "overflow": overflow,
        "split": split,
        "field": field,
        "positions": positions,
        "edges": edges,
        "routes_only": routes_only,
        "shard": (index, count),
        "window": window,
        "batch_tokens": batch_tokens,
        "progress": terminal.progress_wanted(),
    }
    if workers:
        if memory is not None:
            raise ValueError("--memory and --workers exclude one another: a worker holds the whole model")
        found = fr.corpus_on_ray(model, source, out, workers=workers, cpus=cpus, address=ray_address, **options)
    else:
        if memory is not None and routes_only:
            raise ValueError(
                "--memory and --routes-only exclude one another: rows are evaluated after the pass, with "
                "the weights at hand"
            )
        with terminal.busy(f"loading {model}"):
            loaded, tokenizer = fr.load(model) if memory is None else fr.open_streaming(model, memory)
        found = fr.corpus(loaded, tokenizer, source, out, **options)
    done = found.progress[0]
    if json:
        terminal.print_json({"folder": out, "model": found.settings["model"], "domains": found.domains, **asdict(done)})
        return
    terminal.say(f"{found!r} in '{out}': {done.tokens / max(done.seconds, 1e-9):.0f} tokens/s")
    for text in _left_out(done):
        terminal.say(text)


@app.command(
    epilog=examples(
        "flowroutes analyze run --model demo --general english --out report",
        "flowroutes analyze run0 run1 run2 run3 --out report --json | jq -r .report",
    )
)
def analyze(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that 'flowroutes corpus' wrote; several shards of one run together.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, its figures and tables.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="For the concepts that heads write: 'demo', a local folder, a .gguf file or a hub id.",
            autocompletion=terminal.models,
        ),
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="The domain that stands for general text. \\[default: all others]")
    ] = None,
    tagged_domain: Annotated[
        str | None, typer.Option(help="Take the clusters' positions from this domain (the tagger knows English).")
    ] = None,
    method: Annotated[str, typer.Option(help="Of the clusters' picture: 'tsne', 'umap' or 'pca'.")] = "tsne",
    sample: Annotated[int, typer.Option(help="Positions in the clusters' picture.")] = 3000,
    permutations: Annotated[int, typer.Option(help="Of texts between domains.")] = 2000,
    json: Json = False,
) -> None:
    """A report on a corpus run: components, positional heads, clusters, periods as BOS, domains, concepts."""
    fr = _package()
    from flowroutes_fast.analysis import analyze as write_report

    run = fr.open_corpus(*folders)
    loaded, tokenizer = fr.load(model) if model else (None, None)
    page = write_report(
        run,
        out,
        model=loaded,
        tokenizer=tokenizer,
        general=general,
        tagged_domain=tagged_domain,
        method=method,
        sample=sample,
        permutations=permutations,
    )
    if json:
        terminal.print_json({"report": page, "files": sorted(path for path in out.iterdir() if path != page)})
        return
    terminal.say(f"wrote {page} ({page.stat().st_size / 1e3:.0f} kB), figures and tables beside it")


def _left_out(done: object) -> list[str]:
    """What of a corpus was cut or skipped, in sentences."""
    found = []
    if done.truncated:  # type: ignore[attr-defined]
        found.append(f"{done.truncated} texts were cut, {done.dropped} tokens dropped (--overflow split traces them)")  # type: ignore[attr-defined]
    if done.split:  # type: ignore[attr-defined]
        found.append(f"{done.split} texts were traced in pieces")  # type: ignore[attr-defined]
    if done.skipped:  # type: ignore[attr-defined]
        reasons = sorted(done.skipped.items())  # type: ignore[attr-defined]
        found.append("left out or decoded: " + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return found


@app.command(
    epilog=examples(
        "flowroutes bench --quick --tokens 256 --out bench", "flowroutes bench --what end-to-end --tokens 256,512"
    ),
)
def bench(
    tokens: Annotated[str, typer.Option(help="Lengths, comma separated.")] = "256,512,1024",
    shapes: Annotated[
        str, typer.Option(help="Layer shapes: smollm2-135m, llama-2-7b, llama-3-8b, llama-70b.")
    ] = "smollm2-135m,llama-2-7b",
    what: Annotated[
        str, typer.Option(help="Any of kernels, end-to-end, memory, import.")
    ] = "kernels,end-to-end,memory,import",
    out: Annotated[Path, typer.Option(help="Folder for <device>.json and plots.")] = Path("benchmarks/results"),
    backend: Annotated[str, typer.Option(help="Backend of the kernels.")] = "auto",
    quick: Annotated[bool, typer.Option(help="Fewer layers, no rivals, fewer repetitions.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Also write a Chrome trace of one traced pass.")] = None,
) -> None:
    """Correctness first, then speed: kernels against plain PyTorch and the roofline, traces against the forward
    pass.
    """
    _package()
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from flowroutes_fast.bench.report import plots, tables
    from flowroutes_fast.bench.run import run, write_profile
    from flowroutes_fast.system.escape import printable

    try:
        lengths = tuple(int(n) for n in tokens.split(","))
    except ValueError:
        raise ValueError(f"tokens must be whole numbers, comma separated, got {tokens!r}") from None
    if min(lengths) < 1:
        raise ValueError(f"tokens must be positive, got {tokens!r}")
    console = terminal.console()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting")
        path = run(
            tokens=lengths,
            shapes=tuple(shapes.split(",")),
            what=tuple(what.split(",")),
            out=out,
            backend=backend,
            quick=quick,
            step=lambda text: progress.update(task, description=printable(text)),
        )
        if profile is not None:
            progress.update(task, description="profile")
            write_profile(profile, min(lengths))
    import json

    report = json.loads(path.read_text())
    for table in tables(report):
        console.print(table)
    pictures = plots(report, path.with_suffix(""))
    terminal.say("wrote " + ", ".join(str(p) for p in (path, *pictures)))


@app.command(epilog=examples("flowroutes models", "flowroutes models --json | jq -r '.[].family'"))
def models(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown page.")] = False, json: Json = False
) -> None:
    """The model families that can be traced, and what is particular about each."""
    terminal.check_room()
    from rich.table import Table

    from flowroutes_fast.models import table

    if markdown:
        typer.echo(table.markdown(), nl=False)
        return
    if json:
        terminal.print_json([dict(zip(table.COLUMNS, row, strict=True)) for row in table.rows()])
        return
    shown = Table(*table.COLUMNS)
    for row in table.rows():
        shown.add_row(*row)
    terminal.console().print(shown)


@app.command(epilog=examples("flowroutes doctor", "flowroutes doctor --json | jq .backends.cpu"))
def doctor(json: Json = False) -> None:
    """Which backends are available and, for each that is not, why; and whether the native kernels compute what they
    should here.
    """
    terminal.check_room()
    import torch
    import transformers

    from flowroutes_fast import ops
    from flowroutes_fast.ops import native
    from flowroutes_fast.ops.selftest import self_test
    from flowroutes_fast.version import __version__

    wrong = {name: said for name, said in self_test().items() if said}
    if json:
        backends: dict[str, dict[str, object]] = {
            name: {"available": reason is None, "reason": reason} for name, reason in ops.backend_status().items()
        }
        if backends["cpu"]["available"]:
            backends["cpu"] |= {
                "isa": native.extension().isa(),
                "threads": torch.get_num_threads(),
                "self_test": wrong or "ok",
            }
        versions = {
            "flowroutes_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        terminal.print_json({"versions": versions, "backends": backends})
        raise typer.Exit(1 if wrong else 0)
    typer.echo(f"flowroutes_fast {__version__} · torch {torch.__version__} · transformers {transformers.__version__}")
    for name, reason in ops.backend_status().items():
        detail = (
            f" ({native.extension().isa()}, {torch.get_num_threads()} threads)"
            if name == "cpu" and reason is None
            else ""
        )
        typer.echo(f"{name:10} " + (f"available{detail}" if reason is None else f"missing: {reason}"))
    sets = native.instruction_sets()
    if sets and not wrong:
        typer.echo(f"self-test  ok: every native operation agrees with float64 ({', '.join(sets)})")
    for name, said in wrong.items():
        typer.echo(f"self-test  {name}: {said}; build the extension again with plain compiler options")
    if wrong:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: one sentence for whatever goes wrong. ``FLOWROUTES_DEBUG=1`` in the environment shows the
    traceback too.
    """
    with interrupt.watched(), terminal.readable_messages():
        terminal.open_streams()
        try:
            app(standalone_mode=True)
        except SystemExit as done:
            sys.exit(done.code or terminal.write_out())
        except Exception as error:
            if os.environ.get(terminal.DEBUG):
                traceback.print_exc()
            try:
                said, code = _sentence(error), 2 if _refused(error) else 1
            except Exception:  # too little memory to look the options up
                said, code = terminal.sentence(error), 2
            terminal.say(f"flowroutes: {said}", err=True)
            terminal.give_up_output()
            sys.exit(code)


def _refused(error: Exception) -> bool:
    """Can the user mend it? (Else it is our mistake.)"""
    if isinstance(error, (ValueError, TypeError, IndexError, OSError, ImportError, MemoryError)) or terminal.is_memory(
        error
    ):
        return True
    if type(error).__name__ == "SafetensorError":
        return True
    return isinstance(error, RuntimeError) and ("backend" in str(error) or type(error).__name__ == "OutOfMemoryError")


def _sentence(error: Exception) -> str:
    """The error in one sentence that names options of the command that was typed."""
    options = {
        name: [flag for p in command.params for flag in (*p.opts, *p.secondary_opts)]
        for name, command in _commands().items()
    }
    typed = next((word for word in sys.argv[1:] if word in options), "trace")
    said = terminal.in_options(terminal.sentence(error), options[typed], options["trace"])
    if _refused(error):
        return said
    return f"failed, which is a mistake of ours: {type(error).__name__}: {said} ({terminal.DEBUG}=1 shows where)"


def _commands() -> dict[str, Any]:
    from typer.main import get_command

    return get_command(app).commands  # type: ignore[attr-defined, no-any-return]


interrupt.as_before()
