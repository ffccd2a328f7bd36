"""Snapshots in NVlabs' layout, written by the original code; their weights follow a rule, and are not stored.

`data/edm_*.pkl.xz` hold the pickles with zeros in place of the weights. What is rebuilt has the sha256 of the original.
"""

import hashlib
import json
import lzma
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"


def weights_of_rule(key, shape):
    """The values that the original networks were given, from the name of the parameter; float32."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    values = values.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return values * np.float32(0.1) + np.float32(key.endswith("weight"))
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def snapshot_bytes(name):
    """The file of that name, byte for byte."""
    about = json.loads((DATA / "edm_snapshots.json").read_text())[name]
    shapes = json.loads((DATA / f"{name}.json").read_text())["parameters"]
    data = bytearray(lzma.decompress((DATA / f"{name}.pkl.xz").read_bytes()))
    for key, place in about["places"].items():
        weights = weights_of_rule(key, shapes[key]).tobytes()
        data[place : place + len(weights)] = weights
    assert hashlib.sha256(data).hexdigest() == about["sha256"], f"{name} was not rebuilt as it was"
    return bytes(data)


def snapshot(name, folder):
    """The file of that name, in a folder."""
    path = Path(folder) / f"{name}.pkl"
    path.write_bytes(snapshot_bytes(name))
    return path
