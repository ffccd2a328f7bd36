import io
import os
import pickle
import pickletools
from pathlib import Path

import pytest
import torch

from consistency.checkpoints.pickles import _ALLOWED, Record, read_pickle
from snapshots import snapshot, snapshot_bytes

DATA = Path(__file__).parents[1] / "data"


class Reduced:
    """Pickles as a call of a function."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def written(tmp_path, content):
    file = tmp_path / "file.pkl"
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return file


def storage_stream(inner):
    """What a tensor's storage looks like to `torch.storage._load_from_bytes`, with other contents."""
    legacy = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    stream = b"".join(pickle.dumps(part, protocol=2) for part in legacy)
    return stream + inner


def test_embedded_source_is_carried_but_not_run(tmp_path):
    contents = read_pickle(snapshot("edm_ncsnpp", tmp_path))
    raw = snapshot_bytes("edm_ncsnpp")
    assert any(isinstance(arg, str) and arg.startswith("raise RuntimeError") for _, arg, _ in pickletools.genops(raw))
    model = contents["ema"]
    assert type(model) is Record
    assert model.class_name == "EDMPrecond"
    assert contents["dataset_kwargs"]["path"] == "datasets/example.zip"
    assert "model.enc.8x8_down.conv0.resample_filter" in dict(model.tensors())


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch ran",), "posix.system"),
        (eval, ("open('ran', 'w')",), "builtins.eval"),
        (getattr, ("", "join"), "builtins.getattr"),
        (compile, ("1", "", "eval"), "builtins.compile"),
        (torch.load, ("x",), "torch.serialization.load"),
    ],
)
def test_call_of_anything_else_is_refused_and_does_nothing(tmp_path, monkeypatch, function, args, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=name) as caught:
        read_pickle(written(tmp_path, {"ema": Reduced(function, *args)}))
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_stream_inside_a_tensor_is_read_by_the_same_rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = storage_stream(pickle.dumps(Reduced(os.system, "touch ran"), protocol=2))
    evil = Reduced(torch.storage._load_from_bytes, inner)
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_pickle(written(tmp_path, {"ema": evil}))
    assert not Path("ran").exists()


def test_tensors_survive(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.randn(2).half(), "d": torch.zeros(0)}
    found = read_pickle(written(tmp_path, tensors))
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_parameter", b"dnnlib.util\nEasyDict"])
def test_functions_of_the_reader_cannot_be_changed(tmp_path, name):
    # BUILD sets attributes on what it is given: here, of a function or class of the reader.
    stream = b"\x80\x02c" + name + b"\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    with pytest.raises(ValueError, match=r"file\.pkl (was not read: .* change a function|is not a readable)"):
        read_pickle(written(tmp_path, stream))
    assert not hasattr(type(_ALLOWED["dnnlib.util", "EasyDict"]()), "__defaults__")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_damaged_file_is_one_line(tmp_path, share):
    whole = snapshot_bytes("edm_ddpmpp")
    with pytest.raises(ValueError, match=r"file\.pkl is not a readable pickle") as caught:
        read_pickle(written(tmp_path, whole[: int(len(whole) * share)]))
    assert "\n" not in str(caught.value)


def test_bound_methods_of_ect_are_carried_and_do_nothing(tmp_path):
    # Its loss keeps `self.t_to_r = self.t_to_r_sigmoid`: the pickle asks for getattr of one of its own objects.
    module = b"ctorch.nn.modules.container\nModuleDict\n)\x81"
    stream = b"\x80\x04" + b"cbuiltins\ngetattr\n" + module + b"X\x04\x00\x00\x00evil\x86R."
    assert type(read_pickle(written(tmp_path, stream))) is Record


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path, protocol):
    contents = {"a": torch.arange(3), "b": {1, 2}, "c": b"\xff", "d": [1.5, None, True]}
    file = tmp_path / "file.pkl"
    file.write_bytes(pickle.dumps(contents, protocol=protocol))
    found = read_pickle(file)
    assert torch.equal(found.pop("a"), contents.pop("a"))
    assert found == contents


def test_modules_that_hold_each_other_end(tmp_path):
    record = Record()
    record.attributes = {"_modules": {"a": record, "b": Record()}, "_parameters": {"w": torch.zeros(1)}}
    record.attributes["_modules"]["b"].attributes = {"_modules": {"up": record}, "_buffers": {"v": torch.zeros(2)}}
    assert [name for name, _ in record.tensors()] == ["w", "b.v"]


def test_name_cannot_break_the_line(tmp_path):
    name = "os\nsystem\x1b[31m" + "x" * 1000
    stream = b"\x80\x04" + b"\x8c\x01a" + b"X" + len(name).to_bytes(4, "little") + name.encode() + b"\x93."
    with pytest.raises(ValueError) as caught:
        read_pickle(written(tmp_path, stream))
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 400


@pytest.mark.parametrize(("offset", "size", "stride"), [(0, 1000, 1), (15, 2, 1), (-1, 2, 1), (0, 2, 100)])
def test_tensor_outside_of_its_storage_is_refused(tmp_path, offset, size, stride):
    buffer = io.BytesIO()
    torch.save(torch.zeros(4).untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    storage = Reduced(torch.storage._load_from_bytes, buffer.getvalue())
    evil = Reduced(torch._utils._rebuild_tensor_v2, storage, offset, (size,), (stride,), False, None)
    with pytest.raises(ValueError, match=r"file\.pkl is not a readable pickle"):
        read_pickle(written(tmp_path, evil))
