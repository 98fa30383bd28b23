"""Triton's kernels through ``fr.trace``, in the interpreter: whole traces against those of the native CPU kernels."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# The interpreter must be asked for before triton is imported, and other tests must not meet it: a child process runs
# this file.
IN_CHILD = os.environ.get("TRITON_INTERPRET") != "1"
IDS = [3, 14, 15, 92, 65, 35, 89]
KEYS = ["layer", "kind", "source", "target", "head"]

if IN_CHILD:

    def test_in_the_interpreter():
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", __file__], env=environment, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stdout[-5000:]

else:
    from families import make

    import flowroutes_fast as fr
    from flowroutes_fast.kernels import attention, bound, dense

    def tiny(name):
        """One layer of a family: the interpreter takes a second for every few programs."""
        model = make(
            name,
            num_hidden_layers=1,
            num_attention_heads=4,
            hidden_size=36,
            **({} if name == "gpt_neox" else {"head_dim": 10}),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)  # else attention is even, and adds next to nothing
        return model

    @pytest.fixture
    def launched(monkeypatch):
        """Names of the kernels' functions that were called."""
        names = []

        def noting(module, name):
            function = getattr(module, name)

            def call(*args, **kwargs):
                names.append(name)
                return function(*args, **kwargs)

            monkeypatch.setattr(module, name, call)

        noting(attention, "attention_rows")
        noting(bound, "bounds")
        noting(dense, "dense_proximity")
        return names

    def same_route(a, b):
        for threshold in (0.01, 0.04):
            x, y = (t.route(range(len(IDS)), threshold).edges.sort_values(KEYS, ignore_index=True) for t in (a, b))
            assert (x.kind == "attention").sum() > 5
            assert x[KEYS].equals(y[KEYS])
            torch.testing.assert_close(torch.tensor(x.importance), torch.tensor(y.importance), rtol=0.02, atol=1e-5)

    @pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
    def test_triton_through_trace(kind, launched):
        model = tiny(kind)
        exact, found = (
            fr.trace(model, None, IDS, precision="exact", backend="cpu"),
            fr.trace(model, None, IDS, backend="triton"),
        )
        assert {"attention_rows", "bounds"} <= set(launched)
        assert found.backend == "triton"
        assert (found.heads_low <= exact.heads + 1e-5).all()
        assert (exact.heads <= found.heads_high + 1e-5).all()
        assert (found.normaliser_low <= exact.normaliser_low * (1 + 1e-5)).all()
        assert (exact.normaliser_low <= found.normaliser_high * (1 + 1e-5)).all()
        for name in ("ffn", "ffn_residual", "attention_residual", "attention_bias"):
            torch.testing.assert_close(
                getattr(found, name), getattr(exact, name), rtol=0.011, atol=1e-5, equal_nan=True
            )
        same_route(found, exact)

    @pytest.mark.parametrize("kind", ["llama"])
    def test_exact_triton_through_trace(kind, launched):
        model = tiny(kind)
        options = {"precision": "exact", "dense": True}
        exact, found = (fr.trace(model, None, IDS, backend=backend, **options) for backend in ("cpu", "triton"))
        assert "dense_proximity" in launched
        for layer in range(exact.n_layers):
            torch.testing.assert_close(found.attention(layer), exact.attention(layer), rtol=1e-4, atol=1e-5)
        for name in ("heads", "ffn", "attention_residual", "attention_bias"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-4, atol=1e-5)
        same_route(found, exact)

    @pytest.mark.parametrize("kind", ["mistral"])
    def test_signed_triton_through_trace(kind, launched):
        model = tiny(kind)
        exact, found = (
            fr.trace(model, None, IDS, measure="signed", floor=0.01, backend=backend) for backend in ("cpu", "triton")
        )
        assert "bounds" in launched
        for name in ("heads", "ffn", "attention_residual", "attention_bias"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-4, atol=1e-5)
        a, b = (trace.edges(0) for trace in (found, exact))
        assert (a.groupby(["query", "key"]).importance.max() < 0).any()  # pairs that only the other sign finds
        assert a[["query", "key", "head"]].equals(b[["query", "key", "head"]])
        torch.testing.assert_close(torch.tensor(a.importance), torch.tensor(b.importance), rtol=1e-3, atol=1e-5)
        same_route(found, exact)

    def test_decisions_of_a_wide_tolerance_are_settled():
        """Thresholds at which rows are open with so wide a tolerance: they are listed again, at last whole."""
        model, thresholds = tiny("llama"), (0.05, 0.07, 0.09, 0.11)
        exact = fr.trace(model, None, IDS, precision="exact", backend="cpu")
        found = fr.trace(model, None, IDS, backend="triton", tolerance=0.3, floor=0.05, thresholds=thresholds)
        assert found.work["refined"] > 0
        low, high = found.normaliser_low[0, :, None], found.normaliser_high[0, :, None]
        assert (high > low).any()
        near = exact.attention(0).permute(0, 2, 1).flatten(1) * exact.normaliser_low[0, :, None]
        near = torch.cat([near, exact.attention(0).sum(-1) * exact.normaliser_low[0, :, None]], 1)
        for threshold in thresholds:
            assert not ((near > threshold * low * (1 + 1e-4)) & (near <= threshold * high * (1 - 1e-4))).any()

    def test_a_part_at_a_threshold_is_settled():
        """A residual connection whose share may be above the threshold asked for or not."""
        model = tiny("llama")
        options = {"backend": "triton", "tolerance": 0.3, "floor": 0.05}
        open_ = fr.trace(model, None, IDS, thresholds=(), **options)
        low, high = open_.normaliser_low[0], open_.normaliser_high[0]
        row = int(((high - low) / high * (open_.attention_residual[0] > 0.05)).argmax())
        share = float(open_.attention_residual[0, row])
        residual, ends = share * (low + high)[row] / 2, (share * low[row], share * high[row])
        assert ends[0] * 1.001 < residual < ends[1] / 1.001
        refined = fr.trace(model, None, IDS, thresholds=(share,), **options)
        assert not share * refined.normaliser_low[0, row] < residual < share * refined.normaliser_high[0, row]
