"""A spoilt file is refused by name, or what it gives works: no raw error, no warning, whatever was spoilt, also
behind a right checksum.
"""

import pytest
from mutations import attempt, generator, spoil_route, spoil_trace, use_route, use_trace, valid_routes, valid_traces

import flowroutes_fast as fr

TRACES, ROUTES = 250, 200  # spoilt files in a test run; more with other seeds find what these do not


@pytest.fixture(scope="module")
def traces():
    return valid_traces()


def test_valid_files_are_read_and_usable(traces, tmp_path):
    for trace in traces.values():
        use_trace(fr.load_trace(trace.save(tmp_path / "a.trace")), tmp_path)
    for route in valid_routes(traces):
        use_route(fr.load_route(route.save(tmp_path / "a.json")), tmp_path)


def load(call, file, seed, way):
    """What a spoilt file gives, None where it is refused as it should be."""
    try:
        return call(file)
    except fr.DamagedFile as error:
        if file.name not in str(error) or "\n" in str(error):
            raise AssertionError(f"seed {seed}, {way}: no sentence that names the file") from error
        return None


def fuzz_traces(traces, folder, seeds):
    files = [trace.save(folder / f"{number}.trace") for number, trace in enumerate(traces.values())]
    taken = 0
    for seed in seeds:
        rng = generator(seed)
        way = spoil_trace(rng.choice(files), spoilt := folder / "spoilt.trace", rng)
        try:
            if (found := load(fr.load_trace, spoilt, seed, way)) is not None:
                taken += 1
                use_trace(found, folder, pages=taken % 4 == 0)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {way}") from error
    return taken


def fuzz_routes(traces, folder, seeds):
    documents = [route.to_dict() for route in valid_routes(traces)]
    taken = 0
    for seed in seeds:
        rng = generator(seed)
        way = spoil_route(rng.choice(documents), spoilt := folder / "spoilt.json", rng)
        try:
            if (found := load(fr.load_route, spoilt, seed, way)) is not None:
                taken += 1
                attempt(use_route, found, folder)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {way}") from error
    return taken


def test_spoilt_traces(traces, tmp_path):
    taken = fuzz_traces(traces, tmp_path, range(TRACES))
    assert 0 < taken < TRACES / 3


def test_spoilt_routes(traces, tmp_path):
    taken = fuzz_routes(traces, tmp_path, range(ROUTES))
    assert 0 < taken < ROUTES / 3
