"""The exported graph keeps the rules of circuit-tracer's schema, and its weights are shares of what is read."""

import json
from collections import defaultdict

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import flowroutes_fast as fr

NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
}
METADATA = {
    "slug": str,
    "scan": str,
    "transcoder_list": list,
    "prompt_tokens": list,
    "prompt": str,
    "schema_version": int,
}
PARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}


@pytest.fixture(scope="module", params=["sequential", "parallel"])
def trace(request):
    torch.manual_seed(0)
    if request.param == "sequential":
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
        model = LlamaForCausalLM(config).eval()
    else:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=50
            )
        ).eval()
    return fr.trace(model, None, [3, 4, 5, 6, 7, 8])


def check(graph, folder):
    for where, rules in (("metadata", METADATA), ("qParams", PARAMS)):
        for name, kind in rules.items():
            assert type(graph[where][name]) is kind, (where, name)
    for node in graph["nodes"]:
        for name, kind in NODE.items():
            assert type(node[name]) is kind, name
        assert 0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"])
        assert node["layer"] == "E" or int(node["layer"]) >= 0
        assert (node["feature_type"] == "embedding") == (node["layer"] == "E")
        assert node["feature_type"] != "cross layer transcoder"  # fetches from elsewhere
        if node["feature_type"] == "logit":
            float(node["clerp"].split("(p=")[1].split(")")[0])
        assert node["influence"] is None or 0 <= node["influence"] <= 1
    ids = {node["node_id"]: node for node in graph["nodes"]}
    assert len(ids) == len({node["feature"] for node in graph["nodes"]}) == len(graph["nodes"])
    into = defaultdict(float)
    for link in graph["links"]:
        source, target = ids[link["source"]], ids[link["target"]]
        assert source["layer"] == "E" or int(source["layer"]) <= int(target["layer"])
        assert source["ctx_idx"] <= target["ctx_idx"]
        into[link["target"]] += link["weight"]
    assert all(total <= 1 + 1e-5 for total in into.values())
    assert graph["qParams"]["clickedId"] in ids
    assert set(graph["qParams"]["pinnedIds"]) <= set(ids)
    listed = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert [known["slug"] for known in listed].count(graph["metadata"]["slug"]) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"position": [2, 5]}, {"renormalize": False}, {"rule": "flow", "keep": 0.5}, {"position": 0}],
)
def test_schema(trace, options, tmp_path):
    route = trace.route(**({"threshold": 0.02} if "rule" not in options else {}) | options)
    path = route.to_circuit_tracer(tmp_path, slug="toy")
    assert path == tmp_path / "toy.json"
    check(json.loads(path.read_text()), tmp_path)


def test_weights_are_what_is_left_of_all_paths(trace, tmp_path):
    """All shares of a root add up to 1 when nothing of the graph is left out."""
    graph = json.loads(trace.route(-1, 0.001).to_circuit_tracer(tmp_path / "g.json", min_weight=0).read_text())
    logit = next(node["node_id"] for node in graph["nodes"] if node["feature_type"] == "logit")
    assert sum(link["weight"] for link in graph["links"] if link["target"] == logit) == pytest.approx(1, abs=1e-6)


def test_by_hand(tmp_path):
    """One layer, two tokens: the FFN gives half of the root, the head a quarter, the embedding the last quarter."""
    columns = {
        "layer": [0, 0, 0, 0],
        "kind": ["ffn", "ffn_residual", "attention", "attention_residual"],
        "source": [1, 1, 0, 1],
        "target": [1, 1, 1, 1],
        "head": [-1, -1, 2, -1],
        "importance": [0.5, 0.5, 0.5, 0.5],
    }
    import pandas as pd

    route = fr.Route(["a", "b"], 1, 0.01, True, "toy", ["sequential"], pd.DataFrame(columns), [("c", 0.9)])
    graph = json.loads(route.to_circuit_tracer(tmp_path / "by-hand.json").read_text())
    name = {node["node_id"]: node["clerp"] or f"{node['layer']}{node['ctx_idx']}" for node in graph["nodes"]}
    found = {(name[link["source"]], name[link["target"]]): link["weight"] for link in graph["links"]}
    head, ffn, logit = 'L0H2 to "b"', 'FFN 0 at "b"', 'Output "c" (p=0.900)'
    assert found == {
        ("E0", head): 1,
        (head, ffn): 0.5,
        ("E1", ffn): 0.5,
        (ffn, logit): 0.5,
        (head, logit): 0.25,
        ("E1", logit): 0.25,
    }


def test_several_graphs_in_one_folder(trace, tmp_path):
    for slug in ("one", "two", "one"):
        trace.route(-1, 0.04).to_circuit_tracer(tmp_path, slug=slug)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert sorted(known["slug"] for known in listed) == ["one", "two"]
    assert trace.route(-1, 0.04).to_circuit_tracer(tmp_path).name == "345678.json"


def test_bad_input(trace, tmp_path):
    route = trace.route(-1, 0.04)
    with pytest.raises(ValueError, match=r"slug .../x. may hold"):
        route.to_circuit_tracer(tmp_path, slug="../x")
    with pytest.raises(ValueError, match="min_weight"):
        route.to_circuit_tracer(tmp_path, min_weight=1)
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(ValueError, match="lists no graphs"):
        route.to_circuit_tracer(tmp_path)
    assert not list(tmp_path.glob("3*.json"))
