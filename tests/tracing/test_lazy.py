"""Lazy traces: rows evaluated when they are reached give what a full trace gives, whatever was kept of the pass."""

import gc
import random
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny
from families import VARIANTS, make

import flowroutes_fast as fr
from flowroutes_fast.models.families import FAMILIES
from flowroutes_fast.tracing import on_demand

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 7, 51]
NAMES = sorted(FAMILIES) + sorted(VARIANTS)
KEYS = ["layer", "kind", "source", "target", "head"]
LITTLE = 1000  # bytes: too few for anything to be kept by reference


def same_route(found, wanted, threshold, slack=0.0):
    """The same sub-edges with the same numbers; ``slack``: a decision this near its threshold may fall either way."""
    both = found.edges.merge(wanted.edges, on=KEYS, how="outer", indicator=True, suffixes=("", "_wanted"))
    differ = both[both._merge != "both"]
    if slack and len(differ):  # rounding of rows that ran again: pytest says how near it was
        values = differ.importance.fillna(differ.importance_wanted).abs()
        assert (values - threshold).abs().min() < slack, differ
        return
    assert not len(differ), differ
    assert (both.importance - both.importance_wanted).abs().max() < 1e-5 if len(both) else True


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
@pytest.mark.parametrize("name", NAMES)
def test_routes_of_every_family_are_those_of_a_full_trace(name, memory):
    model = make(name)
    lazy = fr.trace(model, None, IDS, lazy=True, memory=memory)
    full = fr.trace(model, None, IDS)
    rng = random.Random(name)
    for renormalize in (True, False):
        for _ in range(6):
            threshold, root = rng.choice([0.01, 0.02, 0.04, 0.1]), rng.randrange(len(IDS))
            found = lazy.route(root, threshold, renormalize)
            same_route(found, full.route(root, threshold, renormalize), threshold, 0.0 if memory is None else 1e-5)
    for array in (
        "heads",
        "attention_residual",
        "attention_bias",
        "mixer",
        "ffn",
    ):  # rounding decides what is evaluated: an estimate may differ
        torch.testing.assert_close(
            getattr(lazy, array), getattr(full, array), atol=2e-5, rtol=1e-4 if memory is None else 2e-2
        )
    assert lazy.certificate["states"] == ("whole" if memory is None else "disk")


def long(kind="llama", tokens=300):
    """A model whose prompt is longer than what is evaluated whole, and the prompt."""
    torch.manual_seed(0)
    return tiny(kind, max_position_embeddings=512), torch.randint(3, 90, (tokens,)).tolist()


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "neox"])
def test_long_prompts_are_bounded_as_in_a_full_trace(kind, memory):
    model, ids = long(kind)
    full, lazy = fr.trace(model, None, ids), fr.trace(model, None, ids, lazy=True, memory=memory)
    for position, threshold in ((-1, 0.04), (150, 0.02), (7, 0.01), (-1, 0.015)):
        same_route(
            lazy.route(position, threshold), full.route(position, threshold), threshold, 0.0 if memory is None else 1e-5
        )
    lazy, full = fr.trace(model, None, ids, lazy=True, memory=memory), fr.trace(model, None, ids)
    for name in ("heads", "heads_low", "heads_high", "normaliser_low", "normaliser_high"):
        torch.testing.assert_close(
            getattr(lazy, name),
            getattr(full, name),
            rtol=1e-5 if memory is None else 2e-2,
            atol=1e-6 if memory is None else 1e-4,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"measure": "signed"},
        {"neurons": True},
        {"bias": "value"},
        {"bias": "exclude"},
        {"precision": "exact"},
        {"backend": "reference"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_every_option(kind, options):
    model = tiny(kind)
    full, lazy = fr.trace(model, None, IDS, **options), fr.trace(model, None, IDS, lazy=True, **options)
    for renormalize in (True, False):
        same_route(lazy.route(-1, 0.02, renormalize), full.route(-1, 0.02, renormalize), 0.02)
    wanted = full.token_attribution(slice(4, 9))
    np.testing.assert_allclose(
        lazy.token_attribution(slice(4, 9)).importance,
        wanted.importance,
        atol=2e-3 if options.get("precision") == "exact" else 1e-5,
    )
    flow = lazy.route(-1, rule="flow", keep=0.1), full.route(-1, rule="flow", keep=0.1)
    assert abs(len(flow[0].edges) - len(flow[1].edges)) <= (0 if "precision" not in options else 50)
    if "neurons" in options:
        mine, theirs = lazy.neurons(1), full.neurons(1)
        assert mine[["position", "neuron"]].equals(theirs[["position", "neuron"]])


def test_rows_are_evaluated_once_and_only_where_a_route_goes():
    model, ids = long()
    lazy = fr.trace(model, None, ids, lazy=True)
    seen = []
    evaluate = lazy.source.evaluate
    lazy.source.evaluate = lambda layer, queries, whole=False: (
        seen.extend((layer, q) for q in queries) or evaluate(layer, queries, whole)
    )
    lazy.route(-1, 0.1)
    first = len(seen)
    assert 0 < first == lazy.certificate["rows"] < 3 * len(ids) / 2
    lazy.route(-1, 0.1)
    lazy.route(-1, 0.5)
    assert len(seen) == first
    lazy.route(20, 0.1)
    assert len(seen) == len(set(seen))


def test_an_index_evaluates_the_rows_it_names():
    model, ids = long()
    lazy, full = fr.trace(model, None, ids, lazy=True), fr.trace(model, None, ids)
    assert lazy.heads.shape == full.heads.shape
    assert lazy.certificate["rows"] == 0
    torch.testing.assert_close(lazy.heads[1, -1], full.heads[1, -1])
    assert lazy.certificate["rows"] == 1
    torch.testing.assert_close(lazy.heads[:, [3, 5]], full.heads[:, [3, 5]])
    assert lazy.certificate["rows"] == 1 + 2 * lazy.n_layers
    torch.testing.assert_close(lazy.ffn[0, 10:12], full.ffn[0, 10:12])
    table, wanted = lazy.edges(2, positions=[8, 30]), full.edges(2)
    wanted = wanted[wanted["query"].isin([8, 30])].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, wanted, rtol=1e-5, atol=1e-7)
    assert lazy.certificate["rows"] == 1 + 2 * lazy.n_layers + 2 + 2
    torch.testing.assert_close(lazy.heads.sum(), full.heads.sum())
    assert lazy.certificate["rows"] == lazy.n_layers * len(ids)


def test_a_batch_is_as_its_prompts_alone():
    model = tiny("llama")
    prompts = [IDS, IDS[:5], IDS[2:11]]
    for memory in (None, LITTLE):
        together = fr.trace(model, None, prompts, lazy=True, memory=memory)
        for one, ids in zip(together, prompts, strict=True):
            same_route(one.route(), fr.trace(model, None, ids).route(), 0.04, 1e-5)


def test_saved_traces_say_what_is_not_there(tmp_path):
    model, ids = long()
    lazy = fr.trace(model, None, ids, lazy=True)
    route = lazy.route(-1, 0.1)
    again = fr.load_trace(lazy.save(tmp_path / "lazy.safetensors"))
    same_route(again.route(-1, 0.1), route, 0.1)
    with pytest.raises(ValueError, match=r"position \d+ of layer \d had not been evaluated when this trace was saved"):
        again.route(5, 0.01)
    with pytest.raises(ValueError, match="was lazy when it was saved and has no figures of"):
        again.to_html(tmp_path / "page.html")
    lazy.to_html(tmp_path / "page.html")
    whole = fr.load_trace(lazy.save(tmp_path / "whole.safetensors"))
    torch.testing.assert_close(whole.heads, fr.trace(model, None, ids).heads)


def test_pickles_and_copies():
    import copy
    import pickle

    model, ids = long()
    lazy = fr.trace(model, None, ids, lazy=True)
    route = lazy.route(-1, 0.1)
    other = pickle.loads(pickle.dumps(lazy))
    same_route(other.route(-1, 0.1), route, 0.1)
    with pytest.raises(ValueError, match="from another process has no states"):
        other.route(5, 0.01)
    for twin in (copy.copy(lazy), copy.deepcopy(lazy)):
        twin.route(5, 0.01)
        assert twin.certificate["rows"] > lazy.certificate["rows"]


def test_a_model_that_changed_or_is_gone_and_released_states_are_refused():
    model, ids = long()
    lazy = fr.trace(model, None, ids, lazy=True)
    route = lazy.route(-1, 0.1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="the model has changed since it was traced"):
        lazy.route(5, 0.01)
    same_route(lazy.route(-1, 0.1), route, 0.1)  # nothing is missing
    lazy = fr.trace(model, None, ids, lazy=True)
    lazy.route(-1, 0.1)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="is gone"):
        lazy.route(5, 0.01)
    lazy.release()
    with pytest.raises(ValueError, match="states of this trace were released"):
        lazy.route(5, 0.01)
    lazy.route(-1, 0.1)


def refusal(ask):
    """What it is refused with, or None."""
    try:
        ask()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox", "mixtral"])
def test_weights_written_without_a_trace_of_it_are_noticed(kind, memory):
    """``.data`` counts no version."""
    model, ids = (make(kind), IDS) if kind == "mixtral" else long(kind, 40)
    full, wanted = fr.trace(model, None, ids), fr.trace(model, None, ids, lazy=True, memory=memory).route(-1, 0.04)
    noticed = 0
    for weight in [p for name, p in model.named_parameters() if ".1." in name]:
        lazy = fr.trace(model, None, ids, lazy=True, memory=memory)
        same_route(lazy.route(-1, 0.04), wanted, 0.04)
        kept = weight.detach().clone()
        weight.data.mul_(1.5)
        ask = partial(lazy.edges, 1, positions=[2, 5, 11])
        refused = refusal(ask)
        if refused is not None:
            assert "layer 1: " in refused
            assert "trace again" in refused
            noticed += 1
            weight.data.copy_(kept)
        found = ask()
        weight.data.copy_(kept)  # where nothing was said these rows do not need it
        other = full.edges(1, positions=[2, 5, 11])
        pd.testing.assert_frame_equal(found, other, rtol=1e-3, atol=1e-5)
    if memory is None:  # W_O alone is read again, and where it had to be transposed its copy is
        assert noticed == (kind != "gpt2")
    else:
        assert noticed >= 3


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
def test_biases_that_are_a_part_of_their_own_are_noticed(memory):
    model, ids = long("gpt2", 300)
    for name in ("attn.c_proj.bias", "attn.c_attn.bias", "attn.c_proj.weight"):
        for bias in ("part", "value", "exclude"):
            weight = dict(model.named_parameters())[f"transformer.h.1.{name}"]
            weight.data.normal_()
            full, lazy = (
                fr.trace(model, None, ids, bias=bias),
                fr.trace(model, None, ids, lazy=True, memory=memory, bias=bias),
            )
            lazy.route(-1, 0.04)
            kept = weight.detach().clone()
            weight.data.mul_(1.5)
            refused = refusal(lambda: lazy.attention_bias[1, [5, 20]])  # noqa: B023
            if refused is not None:
                assert "layer 1: " in refused
                weight.data.copy_(kept)
            found = lazy.attention_bias[1, [5, 20]]
            torch.testing.assert_close(found, full.attention_bias[1, [5, 20]], rtol=1e-3, atol=1e-5)


def test_a_model_that_was_moved_or_converted_is_refused():
    model, ids = long("llama", 40)
    lazy = fr.trace(model, None, ids, lazy=True)
    model.double()
    with pytest.raises(ValueError, match="the model has changed since it was traced"):
        lazy.route()


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
def test_a_hook_that_came_later_does_not_pass(memory):
    model, ids = long()
    lazy = fr.trace(model, None, ids, lazy=True, memory=memory)
    route = fr.trace(model, None, ids).route(-1, 0.1)
    model.model.layers[1].register_forward_hook(lambda m, args, out: out * 1.5)
    if memory is None:  # nothing runs again
        same_route(lazy.route(-1, 0.1), route, 0.1)
    else:  # the last layers' own keys show it
        model.model.layers[2].input_layernorm.register_forward_hook(lambda m, args, out: out * 1.5)
        with pytest.raises(ValueError, match="differ from those of the traced pass"):
            lazy.route(-1, 0.1)


def test_states_that_are_written_to_are_refused():
    model, ids = long()
    lazy = fr.trace(model, None, ids, lazy=True)
    lazy.source.layers[1].key.mul_(2)
    with pytest.raises(ValueError, match="were written to"):
        lazy.route(-1, 0.01)


def test_an_interrupt_leaves_the_trace_usable():
    model, ids = long()
    lazy, full = fr.trace(model, None, ids, lazy=True), fr.trace(model, None, ids)
    evaluate, calls = lazy.source.evaluate, []

    def interrupted(layer, queries, whole=False):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(layer, queries, whole)

    lazy.source.evaluate = interrupted
    with pytest.raises(KeyboardInterrupt):
        lazy.route(-1, 0.04)
    same_route(lazy.route(-1, 0.04), full.route(-1, 0.04), 0.04)


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
def test_two_threads_ask_one_trace(memory):
    model, ids = long()
    lazy, full = fr.trace(model, None, ids, lazy=True, memory=memory), fr.trace(model, None, ids)
    found = {}

    def ask(root):
        found[root] = lazy.route(root, 0.03)

    threads = [threading.Thread(target=ask, args=(root,)) for root in (299, 250, 180, 60)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for root, route in found.items():
        same_route(route, full.route(root, 0.03), 0.03, 1e-5)
    assert len(found) == 4
    assert sum(int((rows.place >= 0).sum()) for rows in lazy.layers) == sum(len(rows.table) for rows in lazy.layers)


def test_refusals():
    model = tiny("llama")
    for options, words in (
        ({"positions": [1]}, "leave out resume= and positions="),
        ({"dense": True, "precision": "exact"}, "leave out lazy=True or dense=True"),
        ({"memory": "much"}, "memory must be a size"),
    ):
        with pytest.raises(ValueError, match=words):
            fr.trace(model, None, IDS, lazy=True, **options)
    with pytest.raises(ValueError, match="belongs to lazy=True"):
        fr.trace(model, None, IDS, memory=1000)
    lazy = fr.trace(model, None, IDS, lazy=True)
    with pytest.raises(IndexError):
        lazy.route(99)
    with pytest.raises(ValueError, match="below this trace's floor"):
        lazy.route(threshold=1e-5)
    with pytest.raises(TypeError, match="has no option"):
        fr.route(model, None, IDS, lazy=True)


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_in_one_call(renormalize):
    model, ids = long()
    full = fr.trace(model, None, ids)
    for threshold in (0.02, 0.04, 0.5):
        same_route(
            fr.route(model, None, ids, -1, threshold, renormalize), full.route(-1, threshold, renormalize), threshold
        ) if renormalize else None
        found = fr.route(model, None, ids, -1, threshold, renormalize).token_edges
        wanted = full.route(-1, threshold, renormalize).token_edges
        assert found.iloc[:, :4].equals(wanted.iloc[:, :4])
    several = fr.route(model, None, [IDS, IDS[:6]])
    same_route(several[1], fr.trace(model, None, IDS[:6]).route(), 0.04)


# --- a cache that the caller has


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox"])
def test_a_cache_takes_the_place_of_the_prompt(kind):
    model, ids = long(kind, 60)
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    full = fr.trace(model, None, ids)
    lazy = fr.trace(model, None, ids, lazy=True, past_key_values=cache)
    assert lazy.certificate["states"] == "cache"
    for position, threshold in ((-1, 0.04), (20, 0.02)):
        same_route(lazy.route(position, threshold), full.route(position, threshold), threshold, 1e-5)
    with pytest.raises(ValueError, match="past_key_values does not belong to these ids"):
        fr.trace(model, None, [*ids[:30], (ids[30] + 1) % 90, *ids[31:]], lazy=True, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 60 of 61 tokens"):
        fr.trace(model, None, [*ids, 5], lazy=True, past_key_values=cache)
    with pytest.raises(ValueError, match="one prompt of ids alone"):
        fr.trace(model, None, ids, past_key_values=cache)


def test_hooks_and_a_cache_are_refused_together():
    model, ids = long("llama", 60)
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))
    with pytest.raises(ValueError, match="layer 1: forward hooks: on self_attn would act on other rows"):
        fr.trace(model, None, ids, lazy=True, past_key_values=cache)
    handle.remove()
    attention.forward = attention.forward
    with pytest.raises(ValueError, match="layer 1: replaced methods: the forward of self_attn would act"):
        fr.trace(model, None, ids, lazy=True, past_key_values=cache)


def test_a_cache_of_a_window_or_of_no_attention_is_refused():
    model, ids = long("mistral", 60)
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sliding window"):
        fr.trace(model, None, ids, lazy=True, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        fr.trace(make("bloom"), None, IDS, lazy=True, past_key_values=())


# --- generation


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "neox"])
def test_generated_tokens_have_the_routes_of_a_full_trace(kind, memory):
    model = tiny(kind)
    model.generation_config.eos_token_id = None
    wanted = model.generate(torch.tensor([IDS]), max_new_tokens=9, do_sample=False)[0, len(IDS) :].tolist()
    running = fr.generate(model, None, IDS, 9, do_sample=False, memory=memory)
    routes = [route for _, route in running]
    assert running.token_ids == wanted
    full = fr.trace(model, None, IDS + wanted)
    for route in routes:
        same_route(route, full.route(route.position, 0.04), 0.04, 1e-5)
    assert [route.position for route in routes] == list(range(len(IDS) - 1, len(IDS) + 8))
    torch.testing.assert_close(
        running.trace.attention_residual,
        fr.trace(model, None, (IDS + wanted)[:-1]).attention_residual,
        atol=1e-3,
        rtol=2e-2,
    )


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "inputs"])
def test_layers_that_would_leave_out_states_of_the_prompt_do_not(memory):
    """Layers that share keys and values run for the positions alone whose logits are asked for, as generation asks."""
    model = make("gemma4_text, shared values")
    model.generation_config.eos_token_id = None
    wanted = model.generate(torch.tensor([IDS]), max_new_tokens=4, do_sample=False)[0, len(IDS) :].tolist()
    running = fr.generate(model, None, IDS, 4, do_sample=False, memory=memory)
    routes = [route for _, route in running]
    assert running.token_ids == wanted
    full = fr.trace(model, None, IDS + wanted)
    for route in routes:
        same_route(route, full.route(route.position, 0.04), 0.04, 1e-5)


def test_many_generated_tokens():
    """A layer grows token by token; what its native arguments point at stays."""
    model, ids = long("gpt2", 20)
    running = fr.generate(model, None, ids, 80, threshold=0.02, do_sample=False)
    routes = [route for _, route in running]
    full = fr.trace(model, None, [*ids, *running.token_ids])
    for number in (0, 31, 33, 50, len(routes) - 1):
        same_route(routes[number], full.route(len(ids) - 1 + number, 0.02), 0.02, 1e-5)


def test_sampling_is_that_of_the_model_and_leaving_early_is_safe():
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    torch.manual_seed(3)
    wanted = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=True, temperature=1.3)[
        0, len(IDS) :
    ].tolist()
    torch.manual_seed(3)
    running = fr.generate(model, None, IDS, 8, do_sample=True, temperature=1.3)
    list(running)
    assert running.token_ids == wanted
    with fr.generate(model, None, IDS, 50, do_sample=False) as few:
        next(few)
        next(few)
    assert len(few.token_ids) == 2
    assert not few._thread.is_alive()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    fr.trace(model, None, IDS)


def test_generation_refuses_by_name():
    model = tiny("llama")
    for options, words in (
        ({"num_beams": 2}, "num_beams=2"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"threshold": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            fr.generate(model, None, IDS, **options)
    with pytest.raises(ValueError, match="nosuch"):
        list(fr.generate(model, None, IDS, 2, nosuch=1))
    assert [number for number, _, _ in fr.generate(model, None, [IDS, IDS[:5]], 2, do_sample=False)] == [0, 0, 1, 1]


def test_what_is_kept_follows_the_memory_that_is_free(monkeypatch):
    """By reference within a quarter of it, block inputs within half; the prompts of a pass share it."""
    model = make("llama")
    kept = fr.trace(model, None, IDS, lazy=True)
    sizes = (
        kept.certificate["state_bytes"],
        fr.trace(model, None, IDS, lazy=True, memory=LITTLE).certificate["state_bytes"],
    )
    whole, lean = (-(-size // kept.n_layers) * kept.n_layers for size in sizes)

    def tier(free, prompts=1):
        monkeypatch.setattr(on_demand, "available_memory", lambda: free)
        found = fr.trace(model, None, [IDS] * prompts if prompts > 1 else IDS, lazy=True)
        return {one.certificate["states"] for one in (found if prompts > 1 else [found])}

    assert tier(None) == tier(8 * whole) == {"whole"}
    assert tier(8 * whole, 8) == {"inputs"}
    assert tier(3 * whole) == {"inputs"}
    assert tier(lean) == tier(0) == {"disk"}
