"""The list of faults stays one of this tree: their texts and tests are there, and all were found when they were
last tried.
"""

import json

import mutants
import pytest
from mutants import MUTANTS, Mutant


@pytest.mark.parametrize("fault", MUTANTS, ids=lambda fault: fault.name)
def test_a_fault_is_one_of_this_tree(fault):
    mutants.home(fault)
    assert fault.old != fault.new
    assert fault.tests
    assert all(mutants.files_of(test.split(" and ")[0]) for test in fault.tests)


def test_every_fault_was_found():
    """``make test-mutants`` writes the record; a new fault is tried before it is kept."""
    record = json.loads(mutants.RECORD.read_text(encoding="utf-8"))
    assert list(record["found_by"]) == [fault.name for fault in MUTANTS]
    assert len(record["found_by"]) == record["faults"] == record["found"] >= 35
    for found in record["found_by"].values():
        file, test = found.split("::")
        assert mutants.ROOT / file in mutants.files_of(test.partition("[")[0]), found


@pytest.mark.parametrize(
    ("file", "old"),
    [("rows.h", "no such text"), ("rows.h", "a.window"), ("nowhere.h", "MR = 6;"), ("common.py", "a.window")],
)
def test_a_text_that_is_not_there_once_is_an_error(file, old):
    with pytest.raises(LookupError, match="must occur once in"):
        mutants.home(Mutant("a fault", file, old, "", ("test_parts",)))
    with pytest.raises(LookupError, match="there is no test"):
        mutants.files_of("test_of_nothing")
