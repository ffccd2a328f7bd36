"""Damage to files: bytes anywhere, and values in JSON and YAML; all drawn by hypothesis."""

import json
import struct

from hypothesis import strategies as st

ODD_VALUES = [
    None, [], {}, "", "x" * 500, "../../etc/passwd", "${oc.env:HOME}", "os.system", True, -1, 0, 10**12, 10**400, 1e308,
    float("nan"), float("inf"), [[[[1]]]], {"_target_": "os.system"}, [None] * 50,
]  # fmt: skip
LENGTHS = [0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def deep(levels=5000, kind="["):
    return "[" * levels + "]" * levels if kind == "[" else '{"a":' * levels + "1" + "}" * levels


@st.composite
def damaged(draw, data, others=()):
    """Some of the bytes of a file, after one to three kinds of damage; `others` are files of other readers."""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["cut", "flip", "insert", "double", "length", "overwrite", "other", "empty"]))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
        elif kind == "double":
            block = data[at : at + draw(st.integers(1, 2000))]
            data = data[:at] + block * draw(st.integers(2, 4)) + data[at:]
        elif kind == "length":
            form = draw(st.sampled_from("HIQ"))
            number = draw(st.sampled_from(LENGTHS)) & ((1 << 8 * struct.calcsize(form)) - 1)
            data = data[:at] + struct.pack(f"<{form}", number) + data[at + struct.calcsize(form) :]
        elif kind == "overwrite":
            new = draw(st.binary(min_size=1, max_size=16))
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "other" and others:
            other = draw(st.sampled_from(list(others)))
            data = draw(st.sampled_from([other, data[:at] + other, other + data[at:]]))
        elif kind == "empty" and draw(st.integers(0, 9)) == 0:
            data = b""
    return data


@st.composite
def altered_json(draw, data):
    """JSON text (which is YAML too) with one to three of its values replaced, or grown deep."""
    if draw(st.integers(0, 14)) == 0:
        return deep(kind=draw(st.sampled_from("[{"))).encode()
    tree = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 5)) == 0:
            del parent[key]
        else:
            parent[key] = json.loads(json.dumps(draw(st.sampled_from(ODD_VALUES))))
    return json.dumps(tree).encode() + b"\n"


def _places(tree):
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)
