"""The graph of a whole text, and the part of it that leads to a token."""

from __future__ import annotations

import networkx as nx
import torch

from llm_transparency_tool.models.transparent_llm import TransparentLlm
from llm_transparency_tool.routes import contributions


def _add(graph: nx.DiGraph, source: str, target: str, weight: float) -> None:
    if graph.has_edge(source, target):
        weight += graph.edges[source, target]["weight"]
    graph.add_edge(source, target, weight=weight)


@torch.no_grad()
def build_full_graph(
    model: TransparentLlm, batch_i: int = 0, renormalizing_threshold: float | None = None
) -> nx.DiGraph:
    layers, length = model.model_info().n_layers, len(model.tokens()[batch_i])
    graph = nx.DiGraph()
    for layer in range(layers):
        for t in range(length):
            graph.add_nodes_from([f"A{layer}_{t}", f"I{layer}_{t}", f"M{layer}_{t}"])
    graph.add_nodes_from(f"X0_{t}" for t in range(length))
    for layer in range(layers):
        pre, mid, post, ffn = (
            state[batch_i][None]
            for state in (
                model.residual_in(layer),
                model.residual_after_attn(layer),
                model.residual_out(layer),
                model.ffn_out(layer),
            )
        )
        shares = contributions.get_attention_contributions(pre, mid, model.decomposed_attn(batch_i, layer)[None])
        ffn_shares = contributions.get_mlp_contributions(mid, post, ffn)
        if renormalizing_threshold is not None:
            shares = contributions.apply_threshold_and_renormalize(renormalizing_threshold, *shares)
            ffn_shares = contributions.apply_threshold_and_renormalize(renormalizing_threshold, *ffn_shares)
        entering = f"I{layer - 1}" if layer else "X0"
        for source in range(length):
            for target in range(length):
                _add(graph, f"{entering}_{source}", f"A{layer}_{target}", shares[0][0, target, source].sum().item())
        for t in range(length):
            _add(graph, f"{entering}_{t}", f"A{layer}_{t}", shares[1][0, t].item())
        for t in range(length):
            _add(graph, f"A{layer}_{t}", f"M{layer}_{t}", ffn_shares[0][0, t].item())
            _add(graph, f"M{layer}_{t}", f"I{layer}_{t}", ffn_shares[0][0, t].item())
            _add(graph, f"A{layer}_{t}", f"I{layer}_{t}", ffn_shares[1][0, t].item())
    return graph


def build_paths_to_predictions(
    graph: nx.DiGraph, n_layers: int, n_tokens: int, starting_tokens: list[int], threshold: float
) -> list[nx.DiGraph]:
    downwards = graph.reverse()
    above = nx.subgraph_view(
        downwards, filter_edge=lambda source, target: downwards.edges[source, target]["weight"] > threshold
    )
    routes = []
    for token in starting_tokens:
        assert 0 <= token < n_tokens
        reached = list(nx.edge_dfs(above, source=f"I{n_layers - 1}_{token}"))
        routes.append(above.edge_subgraph(reached).reverse())
    return routes
