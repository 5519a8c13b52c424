"""A short run of what benchmarks/fuzz.py does by the thousand, its numbers chosen by hypothesis."""

from __future__ import annotations

import pytest
from formats import examine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from more_formats import every_format

HEAVY = ("run.json", "parts of a run", "parts of a run, hashed again", "evidence.json, verified", "a model",
         "an adapter, doctor", "a checkpoint inside a task", "a checkpoint, hashed again", "times",
         "forgotten-rows.jsonl")  # fmt: skip
LONG = ("any file of a run, doctor", "parts of a run, going on", "an adapter on its base", "run.json, hashed again",
        "audit.json and evidence.json")  # fmt: skip  # benchmarks/fuzz.py has these


@pytest.fixture(scope="module")
def known(tiny, tmp_path_factory):
    return {
        one.name: (one, one.read(one.folder, one.files[0]))
        for one in every_format(tmp_path_factory.mktemp("fuzz"), tiny)
    }


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(which=st.integers(0, 2**16), number=st.integers(0, 2**32))
def test_small_files(known, which, number):
    """Those that users and other tools write, and caches."""
    light = [one for one in known if one not in (*HEAVY, *LONG)]
    one, intact = known[light[which % len(light)]]
    examine(one, number, 0, intact)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(HEAVY), number=st.integers(0, 2**32))
def test_whole_folders(known, name, number):
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
