import io
import zipfile

import numpy as np
import pytest

from consistency.io.safe_load import read_json, read_npz, read_yaml


def written(tmp_path, content, name="file"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "is not JSON"),
        ("[" * 200 + "]" * 200, "more than 100 levels"),
        (b"\xff\xfe", "is not text"),
        ("", "is not JSON"),
        ("9" * 5000, "is not JSON"),
        (" " * ((1 << 26) + 1), "larger than 67,108,864 bytes"),
    ],
)
def test_bad_json_is_one_line_that_names_the_file(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as caught:
        read_json(written(tmp_path, content))
    assert str(tmp_path) in str(caught.value)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: !!python/object/apply:os.system ['touch executed']\n", "is not YAML"),
        (LAUGHS, "repeats itself by aliases"),
        ("a: &a [*a]\n", "more than 100 levels"),
        ("a: " + "[" * 200 + "]" * 200, "more than 100 levels"),
        ("a: " + "[" * 10_000, "more than 100 levels|is not YAML"),  # some parsers have a lower limit of their own
        ("a: 2020-13-45\n", "is not YAML"),
        ("a: 0x" + "f" * 100_000, "a number of 100,002 digits"),
        ("- a\n", "is not a table"),
    ],
)
def test_bad_yaml_is_one_line_and_runs_nothing(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        read_yaml(written(tmp_path, content))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_yaml_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert read_yaml(written(tmp_path, "a: ${oc.env:SECRET}\n")) == {"a": "${oc.env:SECRET}"}


def npz(tmp_path, data, packed=zipfile.ZIP_DEFLATED):
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w", packed) as archive:
        archive.writestr("arr_0.npy", data)
    return file


def npy(array, **header):
    """An `.npy` with another header."""
    stream = io.BytesIO()
    facts = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    np.lib.format.write_array_header_1_0(stream, facts)
    return stream.getvalue() + array.tobytes()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with pytest.raises(ValueError, match=r"would unpack .* is the limit"):
        read_npz(npz(tmp_path, bytes(1 << 27)), ["arr_0"])


def test_a_header_that_declares_a_petabyte_is_refused(tmp_path):
    file = npz(tmp_path, npy(np.zeros(4, np.uint8), shape=(10**15,)))
    with pytest.raises(ValueError, match=r"declares .* 1,000,000,000,000,000 bytes, and has 4"):
        read_npz(file, ["arr_0"])


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="it holds objects"):
        read_npz(tmp_path / "a.npz", ["arr_0"])
