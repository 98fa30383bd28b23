"""A corpus on Ray's workers: the same files as one process writes, whoever dies in the middle."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_corpus import TEXTS, Tokenizer, make

import flowroutes_fast as fr
from flowroutes_fast.corpora.results import vectors

ray = pytest.importorskip("ray")
pytest.importorskip("pyarrow")
HERE = os.path.dirname(__file__)
OPTIONS = {"window": 4, "batch_tokens": 100}


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name for it, read when it starts
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def loader(killed: Path | None = None, broken: str = ""):
    """What a worker opens; ``killed``: the first worker that comes to its third batch dies and leaves this file."""

    def load():
        import os
        import sys

        sys.path[:0] = [HERE, os.path.dirname(HERE)]
        from test_corpus import Tokenizer, make

        model, calls = make("llama"), []

        def before(*_):
            calls.append(0)
            if broken:
                raise ValueError(broken)
            if killed is not None and len(calls) == 3 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), 9)

        model.register_forward_pre_hook(before)
        return model, Tokenizer()

    return load


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    yield fr.corpus(make("llama"), Tokenizer(), TEXTS, tmp_path_factory.mktemp("whole") / "run", **OPTIONS)
    torch.set_num_threads(threads)


def same(a, b):
    for table in ("texts", "positions", "edges"):
        x, y = getattr(a, table)(), getattr(b, table)()
        assert len(x) == len(y)
        for column in x:
            if column in ("mean", "components"):
                np.testing.assert_array_equal(vectors(x[column]), vectors(y[column]))
            else:
                assert x[column].tolist() == y[column].tolist()
    assert a.domains == b.domains
    for domain in a.domains:
        for name in ("total", "squares", "active", "in_routes", "patterns", "quiet"):
            np.testing.assert_array_equal(getattr(a.statistics[domain], name), getattr(b.statistics[domain], name))
    assert a.progress[0].digest == b.progress[0].digest


def test_a_worker_dies_and_nothing_is_lost(cluster, whole, tmp_path):
    found = fr.corpus_on_ray(loader(tmp_path / "killed"), TEXTS, tmp_path / "run", workers=2, **OPTIONS)
    assert (tmp_path / "killed").exists()
    assert found.finished
    same(found, whole)


def test_routes_alone(cluster, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    alone = fr.corpus(make("llama"), Tokenizer(), TEXTS, tmp_path / "alone", routes_only=True, **OPTIONS)
    torch.set_num_threads(threads)
    found = fr.corpus_on_ray(loader(), TEXTS, tmp_path / "run", workers=2, routes_only=True, **OPTIONS)
    assert found.states[0].files == alone.states[0].files


def test_one_process_goes_on_where_workers_stopped(cluster, whole, tmp_path, monkeypatch):
    from flowroutes_fast.corpora import run

    write = run.Folder.write

    def stopped(self, window, rows):
        if window.number == 2:
            raise KeyboardInterrupt
        write(self, window, rows)

    with monkeypatch.context() as patched:
        patched.setattr(run.Folder, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            fr.corpus_on_ray(loader(), TEXTS, tmp_path / "run", workers=1, **OPTIONS)
    assert fr.open_corpus(tmp_path / "run").progress[0].windows == 2
    with pytest.raises(ValueError, match="differing: weights"):  # the workers' model had a hook
        fr.corpus(make("llama"), Tokenizer(), TEXTS, tmp_path / "run", **OPTIONS)
    same(fr.corpus(*loader()(), TEXTS, tmp_path / "run", **OPTIONS), whole)


def test_errors_of_workers_and_clusters(cluster, tmp_path):
    with pytest.raises(RuntimeError, match=r"a worker failed: .*no such weights"):
        fr.corpus_on_ray(loader(broken="no such weights"), TEXTS, tmp_path / "run", workers=1, **OPTIONS)
    with pytest.raises(RuntimeError, match="3 workers need 3 processors, and the cluster has 2"):
        fr.corpus_on_ray("demo", TEXTS, tmp_path / "run", workers=3)
    with pytest.raises(RuntimeError, match="2 workers need 2 GPUs, and the cluster has 0"):
        fr.corpus_on_ray("demo", TEXTS, tmp_path / "run", gpus=1)
    with pytest.raises(RuntimeError, match=r"a worker failed: .*no folder or file at '/none/there'"):
        fr.corpus_on_ray("/none/there", TEXTS, tmp_path / "run")


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1"):
        fr.corpus_on_ray("demo", TEXTS, tmp_path / "run", workers=0)
    with pytest.raises(TypeError, match="'treshold': did you mean 'threshold'"):
        fr.corpus_on_ray("demo", TEXTS, tmp_path / "run", treshold=0.1)


def test_every_worker_has_the_model_of_the_run(cluster, tmp_path):
    """Another checkpoint at the same path on one of the machines: refused before any of its rows are written."""

    def load(opened=tmp_path / "opened"):
        import sys

        sys.path[:0] = [HERE, os.path.dirname(HERE)]
        from test_corpus import Tokenizer, make

        model = make("llama")
        if opened.exists():  # all but the first process to open it
            model.lm_head.weight.data[0, 0] += 1
        opened.touch()
        return model, Tokenizer()

    with pytest.raises(
        RuntimeError, match=r"a worker failed: .*a worker's model is not the one that the run began with"
    ):
        fr.corpus_on_ray(load, TEXTS, tmp_path / "run", workers=1, **OPTIONS)
    assert not list((tmp_path / "run").glob("*.parquet"))


def test_other_texts_and_models_are_refused(cluster, whole, tmp_path):
    found = fr.corpus_on_ray(loader(), TEXTS, tmp_path / "run", workers=1, **OPTIONS)
    assert found.states[0].files == whole.states[0].files
    for texts in (TEXTS[:-1], [*TEXTS, "more"], [TEXTS[1], TEXTS[0], *TEXTS[2:]], iter(TEXTS[:-1])):
        with pytest.raises(ValueError, match="the texts are not those of the run"):
            fr.corpus_on_ray(loader(), texts, tmp_path / "run", workers=1, **OPTIONS)
    other = make("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="differing: weights"):
        fr.corpus(other, Tokenizer(), TEXTS, tmp_path / "run", **OPTIONS)
