"""``generate()``: tokens as they appear, each with the route of its prediction."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import Layer, checker, only_here, prepared, unwrap, watched
from flowroutes_fast.capture.kept import KeptLayer
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.models.tokens import token_texts
from flowroutes_fast.results.lazy import LazyTrace
from flowroutes_fast.results.route import Route
from flowroutes_fast.system.arguments import flag, integer, share
from flowroutes_fast.tracing.importances import conservation_error
from flowroutes_fast.tracing.on_demand import States
from flowroutes_fast.tracing.options import Options, names
from flowroutes_fast.tracing.prompts import Message, read_prompts
from flowroutes_fast.tracing.trace import _TOLERANCE as TOLERANCE
from flowroutes_fast.tracing.trace import check_model, lazy_trace, most_probable, options_of, pass_facts

NOT_OURS = ("precision", "dense", "thresholds", "neurons")  # options of trace() that a route in time has no use for
REFUSED = {  # options of model.generate() under which a token is not the answer of one pass over what came before
    "assistant_model": None,
    "num_return_sequences": 1,
    "num_beams": 1,
    "prompt_lookup_num_tokens": None,
    "penalty_alpha": None,
    "streamer": None,
    "return_dict_in_generate": False,
    "past_key_values": None,
    "use_cache": True,
    "prefill_chunk_size": None,
}


class Generation(Iterator[tuple[str, Route]]):
    """Yields ``(token, route)`` while a model generates; :func:`generate` makes one.

    Between two tokens the model is as it was, for anyone to use.

    Attributes:
        trace: the :class:`LazyTrace` of prompt and generated tokens so far, whose rows are evaluated once for all
            routes.
        token_ids: those generated so far; text: what they say.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        walk: dict[str, Any],
        options: Options,
        memory: Any,
        given: dict[str, Any],
    ):
        self._run = _Run(model, tokenizer, ids, walk, options, memory, given)
        self._thread: threading.Thread | None = None

    @property
    def trace(self) -> LazyTrace | None:
        return self._run.trace

    @property
    def token_ids(self) -> list[int]:
        return self._run.token_ids

    @property
    def text(self) -> str:
        tokenizer = self._run.tokenizer
        return str(tokenizer.decode(self.token_ids, skip_special_tokens=True)) if tokenizer is not None else ""

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> tuple[str, Route]:
        if self._run.stopped:
            raise StopIteration
        if self._thread is None:  # which holds the run, not this: what nobody holds any more ends
            self._thread = threading.Thread(target=self._run.work, name="flowroutes-generate", daemon=True)
            self._thread.start()
        self._run.turn.release()
        try:
            answer = self._run.answers.get()
        except BaseException:  # Ctrl-C while a token is computed
            self.close()
            raise
        if isinstance(answer, BaseException):
            self.close()
            raise answer
        if answer is None:
            self.close()
            raise StopIteration
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the generation; what there is stays."""
        self._run.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self._run.stop()


class _Stop(Exception):
    """The caller wants no more tokens."""


class _Run:
    """One run of ``model.generate()`` in a thread of its own, whose layers are kept: after each token it waits for
    its turn.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        walk: dict[str, Any],
        options: Options,
        memory: Any,
        given: dict[str, Any],
    ):
        self.model, self.tokenizer, self.walk, self.options, self.given = model, tokenizer, walk, options, given
        self.prompt, self.token_ids = list(ids), list[int]()
        self.chat: list[Message] = []
        self.trace: LazyTrace | None = None
        self.answers: queue.Queue[Any] = queue.Queue()
        self.turn = threading.Semaphore(0)
        self.stopped = False
        self.blocks: list[Block] = []
        self.states: States | None = None
        self.memory = memory
        self.spans: list[slice] = []
        self.ran: set[int] = set()
        self.layers: list[Layer] = []
        self.check: Any = None
        self.logits: Tensor | None = None
        self.steps = 0
        self.watching = ExitStack()
        self.start = 0.0
        self.threads = torch.get_num_threads()

    def stop(self) -> None:
        self.stopped = True
        self.turn.release()

    def work(self) -> None:
        try:
            self.turn.acquire()
            torch.set_num_threads(self.threads)  # a new thread may begin with another number
            if not self.stopped:
                self._generate()
            self.answers.put(None)
        except BaseException as error:  # (handed on to the thread that asks)
            self.answers.put(None if self.stopped else error)

    def _generate(self) -> None:
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([self.prompt], dtype=torch.int64, device=device)
        self.start, self.blocks = time.perf_counter(), blocks_of(self.model)
        self.states = States(self.model, self.options, len(self.blocks), self.memory)
        self._watch()
        try:
            with suppress(_Stop):
                self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self, use_cache=True, **self.given
                )
        finally:
            self.watching.close()

    def _watch(self) -> None:
        """Until ``watching`` is closed the model is ours: its hooks, its mode, the lock of whoever traces."""
        with ExitStack() as stack:
            stack.enter_context(prepared(self.model, self.blocks))
            for block in self.blocks:
                stack.enter_context(watched(block, self.spans, self.options.neurons, self.take, self, ran=self.ran))  # type: ignore[arg-type]
            for handle in (
                self.model.register_forward_pre_hook(only_here(self.begins), with_kwargs=True, prepend=True),
                self.model.register_forward_hook(only_here(self.ends)),
            ):
                stack.callback(handle.remove)
            self.watching = stack.pop_all()

    def _emit(self, token: int) -> None:
        """A token was chosen: its route, and then wait until the next one is asked for."""
        assert self.trace is not None
        self.trace.prediction = most_probable(self.logits, self.tokenizer)
        found = self.trace.route(len(self.trace.tokens) - 1, **self.walk)
        self.token_ids.append(token)
        self.watching.close()
        self.answers.put((token_texts(self.tokenizer, [token])[0], found))
        self.turn.acquire()
        if self.stopped:
            raise _Stop
        self._watch()

    # --- hooks of the model: one pass begins and ends

    def begins(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from flowroutes_fast.capture.hooks import _here

        given = kwargs.get("input_ids", args[0] if args else None)
        if given is None or given.shape[0] != 1:
            raise ValueError("model.generate() runs several sequences at once: routes are of one")
        new = len(self.prompt) + len(self.token_ids) - (0 if self.trace is None else len(self.trace.tokens))
        if given.shape[1] != new:
            raise ValueError(
                f"model.generate() gives the model {given.shape[1]} tokens in a pass where {new} are new (it keeps no "
                f"cache of keys and values, "
                "or fills it in pieces): trace the generated text instead, with fr.trace(..., lazy=True)"
            )
        self.spans[:] = [slice(0, given.shape[1])]
        self.ran.clear()
        _here.masks.clear()
        self.layers.clear()
        self.check = checker(self.model, self.blocks) if self.states is not None and not self.states.layers else None
        if "logits_to_keep" in kwargs and not self.blocks[0].family.last_logits:  # it would leave out states
            kwargs = kwargs | {"logits_to_keep": 0}
        return args, kwargs

    def ends(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self.states is not None
        self.logits = output.logits[0, -1] if isinstance(getattr(output, "logits", None), Tensor) else None
        if len(self.layers) != len(self.blocks):
            raise ValueError(f"{len(self.layers)} layers were captured but the model has {len(self.blocks)}")
        if self.check is not None:
            self.check.finish()
            for layer in self.layers:
                self.states.keep(layer)
            facts = pass_facts(
                self.model,
                self.blocks,
                self.tokenizer,
                self.prompt,
                self.options,
                None,
                time.perf_counter() - self.start,
            )
            self.trace = lazy_trace(self.states, self.options, facts | {"chat": self.chat})
        else:
            self._grow()
        self.layers.clear()

    def _grow(self) -> None:
        """The rows of the tokens that this pass was given."""
        assert self.states is not None
        assert self.trace is not None
        before = len(self.trace.tokens)
        self.states.append(self.layers)
        # then one layer a step
        looked_at = range(len(self.layers)) if not self.steps else [self.steps % len(self.layers)]
        self.steps += 1
        for index in looked_at:
            self._check_grown(self.states.layers[index], self.layers[index], before)
        new = self.token_ids[-len(self.layers[0].resid_post) :]
        self.trace.extend(token_texts(self.tokenizer, new), new)

    def _check_grown(self, kept: KeptLayer, layer: Layer, first: int) -> None:
        """``ValueError`` unless the parts of the rows from position ``first`` on add up to their states."""
        if not kept.lean:
            positions = torch.arange(first, first + len(layer.resid_post), dtype=torch.int64, device="cpu")
            layer = kept.rows(self.model, positions, self.options.neurons)
        error = conservation_error(replace(layer, weight=None))
        if not error < 10 * TOLERANCE.get(layer.resid_post.dtype, 1e-5):
            raise ValueError(
                f"layer {layer.index}: what was captured while generating does not add up to its states ({error:.1e})"
            )

    def take(self, item: int, layer: Layer) -> None:
        self.layers.append(layer)

    # --- in the place of the check of each layer

    def enters(self, sequence: Any, block: Block, state: Tensor) -> None:
        if self.check is not None:
            self.check.enters(sequence, block, state)

    def leaves(self, sequence: Any, state: Tensor) -> None:
        if self.check is not None:
            self.check.leaves(sequence, state)

    def __call__(self, layer: Layer, computing: torch.dtype | None = None) -> None:
        if self.check is not None:
            self.check(layer, computing)

    # --- the streamer of model.generate()

    def put(self, value: Tensor) -> None:
        if value.dim() > 1:  # the prompt
            return
        if self.stopped:
            raise _Stop
        self._emit(int(value.reshape(-1)[-1]))

    def end(self) -> None: ...


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    max_new_tokens: int = 20,
    threshold: float = 0.04,
    renormalize: bool = True,
    **options: Any,
) -> Any:
    """Generate with ``model.generate()`` and yield ``(token, route)`` as each token appears.

    A token's route is that of the state that predicted it. Routes share keys, values and evaluated rows, so that each
    costs about the rows that are new. The tokens are those of ``model.generate(**options)``: greedy, or sampled with
    torch's seed.

    Args:
        model, tokenizer: as for :func:`flowroutes_fast.trace`. prompt: a text or ids; several give an iterator of
            ``(prompt's number, token, route)``, prompt after prompt, each run alone.
        max_new_tokens: tokens at most; the model's end token ends before. threshold, renormalize: of the routes.
        options: ``measure``, ``backend``, ``floor``, ``tolerance``, ``bias``, ``threads``, ``memory`` as for
            ``trace(lazy=True)``; all others go to ``model.generate()`` (``do_sample``, ``temperature``, ``top_p`` …).

    Returns:
        A :class:`Generation`: an iterator, with ``trace``, ``text``, ``close()``. Leaving it (``close()``, ``with``,
        Ctrl-C) keeps what there is.

    Raises:
        ValueError: an option that makes several sequences at once or brings its own cache (named). TypeError: as for
            ``trace()``.
    """
    if integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    limit, renormalize = share("threshold", threshold), flag("renormalize", renormalize)
    model = unwrap(model)
    for name, only in REFUSED.items():
        if options.get(name, only) not in (only, None):
            raise ValueError(
                f"{name}={options[name]!r} cannot be used: each token's route is that of one pass over one sequence"
            )
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"a {type(model).__name__} does not generate")
    check_model(model)
    given = read_prompts(model, tokenizer, prompt)
    if given.inputs:
        raise ValueError(f"{', '.join(map(repr, given.inputs))} cannot be used with generate(): give text or ids alone")
    ours = {name: options.pop(name) for name in (*names(but=NOT_OURS), "memory") if name in options}
    memory = ours.pop("memory", None)
    if limit == 0:
        raise ValueError("threshold must be above 0: a route of everything is trace(..., precision='exact', lazy=True)")
    settings: dict[str, Any] = {
        "floor": limit,
        "thresholds": (limit,),
        "tolerance": 0.1 if renormalize else 1e-2,
    } | ours
    chosen = options_of(model, **settings)
    walk = {"threshold": limit, "renormalize": renormalize}
    options.pop("use_cache", None)
    options = {"max_new_tokens": max_new_tokens} | options
    each = [Generation(model, tokenizer, ids, walk, chosen, memory, options) for ids in given.ids]
    for one, chat in zip(each, given.chats, strict=True):
        one._run.chat = chat
    return _several(each) if given.several else each[0]


def _several(each: Sequence[Generation]) -> Iterator[tuple[int, str, Route]]:
    for number, generation in enumerate(each):
        with generation:
            for token, found in generation:
                yield number, token, found
