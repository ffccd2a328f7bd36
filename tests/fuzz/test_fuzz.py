"""Damaged and hostile files: every reader says so in one line, runs nothing and ends in time.

FUZZ_INPUTS=400 (inputs a reader, `make fuzz`) in place of a short, fixed draw.
"""

import os
import shutil
import signal
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import altered_json, damaged
from readers import ANY_ERROR, MARKER, READERS, payloads

pytestmark = pytest.mark.slow
INPUTS = int(os.environ.get("FUZZ_INPUTS", 0))
SECONDS = 10  # that one input may take


class Hang(BaseException):
    pass


def _hang(*_):
    raise Hang


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Contents of a valid file of each reader, and the payloads."""
    found = payloads()
    for index, reader in enumerate(READERS.values()):
        folder = tmp_path_factory.mktemp(str(index))
        found.append(reader.make(folder).read_bytes()[:100_000])
    return found


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_one_line(name, others, tmp_path, monkeypatch, record_property):
    reader = READERS[name]
    valid, work = tmp_path / "valid", tmp_path / "work"
    valid.mkdir()
    file = reader.make(valid).relative_to(valid)
    shutil.copytree(valid, work)
    monkeypatch.chdir(tmp_path)
    reader.read(work)  # a valid file is read
    contents = (valid / file).read_bytes()
    inputs = damaged(contents, others)
    if reader.is_json:
        inputs = st.one_of(altered_json(contents), inputs)
    count = {"": 0, " read": 0}

    @settings(
        max_examples=INPUTS or 15, derandomize=not INPUTS, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs)
    def read(data):
        shutil.rmtree(work)
        shutil.copytree(valid, work)
        (work / file).write_bytes(data)
        count[""] += 1
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            reader.read(work)
            count[" read"] += 1
        except (ValueError, OSError) as error:
            if name not in ANY_ERROR and (str(work) not in str(error) or "\n" in str(error).strip()):
                raise AssertionError(f"not one line that names the file: {error}") from error
        except Exception:
            if name not in ANY_ERROR:
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert not (tmp_path / MARKER).exists()
        assert not (work / MARKER).exists()

    handler = signal.signal(signal.SIGALRM, _hang)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    finally:
        signal.signal(signal.SIGALRM, handler)
        for kind, number in count.items():
            record_property(f"fuzz {name}{kind}", number)
    assert {path.name for path in tmp_path.iterdir()} == {"valid", "work"}, "something was written outside"
