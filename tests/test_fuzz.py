"""A short run of what benchmarks/fuzz.py does by the thousand, its numbers chosen by hypothesis."""

from __future__ import annotations

import pytest
from formats import examine, formats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIGHT = ("rows", "options", "text", "configuration", "policy", "a package's record", "history.jsonl", "an adapter")
HEAVY = ("run.json", "parts of a run", "parts of a run, hashed again", "evidence.json, verified", "an adapter, doctor")


@pytest.fixture(scope="module")
def known(tiny, tmp_path_factory):
    return {
        one.name: (one, one.read(one.folder, one.files[0])) for one in formats(tmp_path_factory.mktemp("fuzz"), tiny)
    }


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(LIGHT), number=st.integers(0, 2**32))
def test_files_that_users_write(known, name, number):
    one, intact = known[name]
    examine(one, number, 0, intact)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(HEAVY), number=st.integers(0, 2**32))
def test_files_that_forgetless_writes(known, name, number):
    one, intact = known[name]
    examine(one, number, 0, intact)


def test_the_oracle_finds_what_it_is_for(known):
    """A silent success on a file that a hash covers, and an error that does not name the file, are failures."""
    from dataclasses import replace

    from formats import outcome

    from forgetless.errors import RunError

    def mute(folder, file):
        raise RunError("something is wrong")

    one, intact = known["run.json"]
    file = one.files[0]
    with pytest.raises(AssertionError, match="without a word"):
        outcome(replace(one, read=lambda folder, file: "another"), file, b"{}", intact)
    with pytest.raises(AssertionError, match="does not name"):
        outcome(replace(one, read=mute), file, b"{}", intact)
    assert outcome(one, file, file.read_bytes(), intact) == "equal"
    assert outcome(one, file, file.read_bytes()[:-9], intact) == "error"
