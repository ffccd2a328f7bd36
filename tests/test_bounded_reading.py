import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from consistency.io.atomic import atomic_write
from consistency.io.safe_load import read_json, read_npz, read_yaml
from consistency.io.tensors import load_torch, read_meta, read_state, read_tensors, write_safetensors, write_tensors


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: !!python/object/apply:os.system ['touch executed']\n", "is not YAML"),
        ("a: &a [*a]\n", "more than 100 levels"),
        ("a: " + "[" * 200 + "]" * 200, "more than 100 levels"),
        ("a: " + "[" * 10_000, "is not YAML"),
        ("a: 2020-13-45\n", "is not YAML"),
        ("? [a]\n: b\n", "is not YAML"),
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


@pytest.mark.parametrize("write", [np.savez, np.save])
def test_objects_are_refused(tmp_path, monkeypatch, write):
    """Nothing is unpickled, neither from an archive nor from a single array."""
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "file").open("wb") as file:
        write(file, np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match=r"file is not an \.npz of plain arrays") as caught:
        read_npz(tmp_path / "file", ["arr_0"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


class Trap:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["cut", "other", "missing", "no array"])
def test_bad_npz_is_one_line(tmp_path, damage):
    file = tmp_path / "a.npz"
    np.savez(file, arr_0=np.zeros(1000))
    if damage == "missing":
        file.unlink()
    elif damage == "no array":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("arr_0.npy", b"text")
    else:
        file.write_bytes(file.read_bytes()[:2000] if damage == "cut" else b"text")
    with pytest.raises(ValueError, match=r"a\.npz (cannot be read|is not an \.npz of plain arrays): .") as caught:
        read_npz(file, ["arr_0"])
    assert "\n" not in str(caught.value)


class TestTensors:
    @pytest.mark.parametrize("read", [load_torch, read_state])
    @pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
    def test_nothing_is_unpickled(self, tmp_path, monkeypatch, read, save):
        monkeypatch.chdir(tmp_path)
        save({"weight": Trap()}, tmp_path / "a.pt")
        with pytest.raises(
            ValueError, match=r"a\.pt is not a readable file of tensors: .*nothing of it was run"
        ) as caught:
            read(tmp_path / "a.pt")
        assert "weights_only" not in str(caught.value)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("content", [{"a": 1}, {0: torch.zeros(1)}, [torch.zeros(1)]])
    def test_other_contents_than_tensors(self, tmp_path, content):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="a\\.pt is not a state dict"):
            read_state(tmp_path / "a.pt")

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
    def test_damage_is_one_line(self, tmp_path, name):
        file = tmp_path / name
        for content in (None, b"", b"text", b"PK\3\4 cut short"):
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is not a readable file of tensors: .") as caught:
                read_state(file)
            assert "\n" not in str(caught.value)

    def test_checksums(self, tmp_path):
        file = tmp_path / "a.safetensors"
        write_tensors(file, {"mean": torch.arange(4.0)}, {"id": "x"})
        assert read_meta(file) == {"id": "x"}
        assert read_tensors(file)["mean"].tolist() == [0, 1, 2, 3]
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged \(mean does not have its checksum\)"):
            read_tensors(file)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            read_tensors(file, ["other"])


class TestAtomicWrite:
    def test_a_failure_leaves_the_old_file(self, tmp_path):
        (tmp_path / "a").write_text("old")
        with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "a") as partial:
            partial.joinpath("..").resolve().write_text("the disk fails")
        assert (tmp_path / "a").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    @pytest.mark.parametrize("flush", [True, False])
    def test_a_file_is_replaced_and_folders_are_made(self, tmp_path, flush):
        for text in ("old", "new"):
            with atomic_write(tmp_path / "b" / "a", flush=flush) as partial:
                partial.write_text(text)
        assert (tmp_path / "b" / "a").read_text() == "new"
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["a"]

    def test_others_may_read_what_the_library_made_private(self, tmp_path):
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
        (tmp_path / "b").touch()
        assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
