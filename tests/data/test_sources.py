import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from consistency.data.sources import Files, Lmdb, Zip


def save(path, value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path, **options)


def value(source, index):
    return int(np.asarray(source.open(index)).flat[0])


@pytest.fixture
def folder(tmp_path):
    """Classes bird and cat, written in the other order, with files that are no images."""
    root = tmp_path / "animals"
    save(root / "cat" / "1.png", 10)
    save(root / "cat" / "deep" / "0.PNG", 20)
    save(root / "bird" / "2.png", 30)
    save(root / "bird" / ".hidden.png", 99)
    (root / "bird" / "notes.txt").write_text("no image")
    (root / "README").write_text("no image")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def make_zip(tmp_path):
    def make(images, labels="none", name="set.zip"):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for file, level in images.items():
                save(tmp_path / "one.png", level)
                archive.write(tmp_path / "one.png", file)
            if labels != "none":
                archive.writestr("dataset.json", labels if isinstance(labels, str) else json.dumps({"labels": labels}))
        return path

    return make


class TestFiles:
    def test_sub_folders_by_name_are_the_classes(self, folder):
        source = Files(folder)
        assert source.name == "animals"
        assert source.classes == ["bird", "cat"]
        assert [(value(source, i), source.labels[i]) for i in range(len(source))] == [(30, 0), (10, 1), (20, 1)]
        assert source.describe(1) == str(folder / "cat" / "1.png")

    def test_no_sub_folders_no_classes(self, tmp_path):
        save(tmp_path / "b.png", 2)
        save(tmp_path / "a.jpg", 1)
        source = Files(tmp_path)
        assert (source.classes, list(source.labels)) == ([], [0, 0])
        assert [value(source, 0), value(source, 1)] == [1, 2]

    def test_sub_folders_may_mean_nothing(self, folder):
        source = Files(folder, labelled=False)
        assert (len(source), source.classes, list(source.labels)) == (3, [], [0, 0, 0])

    def test_images_beside_the_classes_are_refused(self, folder):
        save(folder / "stray.png")
        with pytest.raises(ValueError, match=r"sub-folders .* beside them \(stray\.png\)"):
            Files(folder)

    def test_linked_sub_folder(self, folder, tmp_path):
        save(tmp_path / "elsewhere" / "x.png", 7)
        (folder / "dog").symlink_to(tmp_path / "elsewhere")
        assert Files(folder).classes == ["bird", "cat", "dog"]

    def test_fingerprint(self, folder, tmp_path):
        first = Files(folder).fingerprint()
        assert Files(folder).fingerprint() == first
        (folder / "README").write_text("changed, but no image")
        folder = folder.rename(tmp_path / "moved")
        assert Files(folder).fingerprint() == first
        # Another time of change, another name, another image: each is another set.
        os.utime(folder / "cat" / "1.png", ns=(1, 1))
        changed = Files(folder).fingerprint()
        (folder / "cat" / "1.png").rename(folder / "cat" / "3.png")
        renamed = Files(folder).fingerprint()
        save(folder / "cat" / "4.png")
        assert len({first, changed, renamed, Files(folder).fingerprint()}) == 4

    def test_empty_or_missing_folder(self, tmp_path):
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(ValueError, match=r"holds no images .*data\.dataset\.path"):
            Files(tmp_path)
        with pytest.raises(ValueError, match=r"nowhere does not exist; change data\.dataset\.path"):
            Files(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"a\.txt is a file"):
            Files(tmp_path / "a.txt")


class TestZip:
    images = {"00000/b.png": 1, "00000/a.png": 2, "00001/c.png": 3}

    def test_labels_go_by_name(self, make_zip):
        source = Zip(make_zip(self.images, [["00001/c.png", 5], ["00000/b.png", 0], ["00000/a.png", 3]]))
        assert [(value(source, i), source.labels[i]) for i in range(3)] == [(2, 3), (1, 0), (3, 5)]
        assert source.classes == ["0", "1", "2", "3", "4", "5"]
        assert source.describe(2).endswith("set.zip: 00001/c.png")

    @pytest.mark.parametrize("labels", ["none", None, []])
    def test_without_labels(self, make_zip, labels):
        source = Zip(make_zip(self.images, labels))
        assert (list(source.labels), source.classes) == ([0, 0, 0], [])

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            ([["00000/b.png", 0]], "has no label for 00000/a.png"),
            ([["00000/b.png", 0], ["00000/a.png", -1], ["00001/c.png", 1]], "has -1 for 00000/a.png"),
            ([["00000/b.png", 0], ["00000/a.png", [0.5]], ["00001/c.png", 1]], "has .0.5. for"),
            ([["00000/b.png", 0], ["00000/a.png", 10**30], ["00001/c.png", 1]], "dataset.json has 1000.*to 999,999"),
            ("not json", "dataset.json is not"),
            ("[" * 100_000, "dataset.json is not"),
            ("[1]", "dataset.json is not"),
            ('{"labels": 3}', "dataset.json is not"),
        ],
    )
    def test_wrong_labels(self, make_zip, labels, words):
        with pytest.raises(ValueError, match=words):
            Zip(make_zip(self.images, labels))

    def test_fingerprint(self, make_zip):
        labels = [["00000/b.png", 0], ["00000/a.png", 3], ["00001/c.png", 5]]
        first = Zip(make_zip(self.images, labels)).fingerprint()
        assert Zip(make_zip(self.images, labels, name="copy.zip")).fingerprint() == first
        other = [make_zip({**self.images, "00001/c.png": 4}, labels), make_zip(self.images, name="b.zip")]
        assert len({first, *(Zip(path).fingerprint() for path in other)}) == 3

    def test_what_is_left_out_is_said(self, make_zip, caplog):
        Zip(make_zip(self.images, [*([name, 0] for name in self.images), ["gone.png", 1]]))
        assert "names 1 images that are not in the zip, gone.png" in caplog.text
        with zipfile.ZipFile(make_zip(self.images, name="deep.zip"), "a") as archive:
            archive.writestr("00000/dataset.json", "{}")
        assert Zip(archive.filename).classes == []
        assert "00000/dataset.json is not read" in caplog.text

    def test_not_a_zip(self, tmp_path, make_zip):
        (tmp_path / "a.zip").write_bytes(b"PK, but no zip")
        with pytest.raises(ValueError, match=r"a\.zip is not a zip"):
            Zip(tmp_path / "a.zip")
        with pytest.raises(ValueError, match="does not exist"):
            Zip(tmp_path / "b.zip")
        with pytest.raises(ValueError, match="holds no images"):
            Zip(make_zip({}))

    def test_pickled_for_a_worker(self, make_zip):
        assert value(pickle.loads(pickle.dumps(Zip(make_zip(self.images)))), 2) == 3


class TestLmdb:
    @pytest.fixture
    def database(self, tmp_path):
        lmdb = pytest.importorskip("lmdb")
        path = tmp_path / "cat_lmdb"
        with lmdb.open(str(path), map_size=1 << 20) as env, env.begin(write=True) as transaction:
            for key, level in ((b"beef", 1), (b"cafe00", 2), (b"abba", 3)):
                save(tmp_path / "one.webp", level, lossless=True)
                transaction.put(key, (tmp_path / "one.webp").read_bytes())
        return path

    def test_images_in_the_order_of_keys(self, database):
        source = Lmdb(database)
        assert source.name == "cat"
        assert (len(source), list(source.labels), list(source.classes)) == (3, [0, 0, 0], [])
        assert [value(source, i) for i in range(3)] == [3, 1, 2]
        assert source.describe(2) == f"{database}: key cafe00"

    def test_read_by_loader_workers(self, database):
        from torch.utils.data import DataLoader

        from consistency.data.datasets import lsun

        data = lsun(database, image_size=4, channels=1)
        assert data[1][0].unique().tolist() == [1]  # opened here, before the fork
        (images, _) = next(iter(DataLoader(data, batch_size=3, num_workers=1)))
        assert images[:, 0, 0, 0].tolist() == [3, 1, 2]

    def test_fingerprint(self, database):
        first = Lmdb(database).fingerprint()
        os.utime(database / "data.mdb", ns=(1, 1))
        assert Lmdb(database).fingerprint() != first

    def test_damaged(self, database):
        (database / "data.mdb").write_bytes(b"nonsense" * 2000)
        with pytest.raises(ValueError, match="cannot be opened as an LMDB"):
            Lmdb(database)

    @pytest.mark.parametrize("pages", [1.2, 2, 2.5])
    def test_cut_short(self, database, pages):
        """Read, it would end the process with a bus error."""
        os.truncate(database / "data.mdb", int(pages * 4096))
        with pytest.raises(ValueError, match=r"data\.mdb is cut short \([\d,]+ of [\d,]+ bytes\)"):
            Lmdb(database)

    def test_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(ValueError, match=r"pip install 'consistency\[lsun\]'"):
            Lmdb(tmp_path)


def test_a_picture_of_another_kind_is_not_handed_to_an_interpreter(tmp_path):
    """Pillow runs Ghostscript on PostScript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UnidentifiedImageError):
        Files(tmp_path).open(0)


def test_a_zip_writes_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../escape.png", b"")
        file.writestr("a.png", b"")
    source = Zip(tmp_path / "a.zip")
    assert source.names == ["a.png"]
    with pytest.raises(UnidentifiedImageError):
        source.open(0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
