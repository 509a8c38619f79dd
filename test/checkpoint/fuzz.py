"""Damage safetensors files in every way a seed gives and load them: ``python fuzz.py 10000``.

A damaged file of int4q is refused with a ``ValueError`` or holds what it held before. One without
checksums, as transformers writes it, cannot say whether its bytes are the ones that were written:
it is refused or loads.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import int4q
from int4q.checkpoint.schema import SEAL


def state():
    torch.manual_seed(0)
    tied = torch.randn(6, 32).bfloat16()
    scaled = int4q.Int4Tensor.from_hp(torch.randn(4, 64), [1, 32])
    scaled.act_pre_scale = torch.rand(64)
    return {
        "model.embed.weight": tied,
        "lm_head.weight": tied,
        "model.up.weight": int4q.Int4Tensor.from_hp(torch.randn(32, 32).bfloat16(), [1, 32]),
        "model.experts.down": int4q.Int4Tensor.from_hp(torch.randn(2, 4, 64), [1, 1, 32]).mT,
        "model.scaled.weight": scaled,
        "model.norm.weight": torch.randn(32),
        "steps": torch.tensor(3),
    }


def header(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def framed(top: dict, rest: bytes) -> bytes:
    text = json.dumps(top).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def without_seal(data: bytes) -> bytes:
    top, rest = header(data)
    del top["__metadata__"][SEAL]
    return framed(top, rest)


# --- damage: (random, bytes) -> bytes -------------------------------------------------------------


def place(r, data):
    """Anywhere, but more often in the header, of which most can go wrong."""
    size = int.from_bytes(data[:8], "little")
    return r.choice([r.randrange(8), r.randrange(8, 8 + size), r.randrange(len(data))])


def flip_a_bit(r, data):
    i = place(r, data)
    return data[:i] + bytes([data[i] ^ (1 << r.randrange(8))]) + data[i + 1 :]


def change_a_byte(r, data):
    i = place(r, data)
    return data[:i] + bytes([r.choice(b'0123456789"[]{},: ') if i > 8 else 0]) + data[i + 1 :]


def cut(r, data):
    return data[: place(r, data)]


def drop(r, data):
    i = place(r, data)
    return data[:i] + data[i + r.randrange(1, 9) :]


def insert(r, data):
    i = place(r, data)
    return data[:i] + r.randbytes(r.randrange(1, 9)) + data[i:]


def exchange(r, data):
    (i, j), n = sorted((place(r, data), place(r, data))), r.randrange(1, 9)
    if i + n > j:
        return data[:i]
    return data[:i] + data[j : j + n] + data[i + n : j] + data[i : i + n] + data[j + n :]


def change_the_header(r, data):
    """Another value somewhere in it, all else as it was: what only checks of sense can find."""
    top, rest = header(data)
    spot = r.choice(list(spots(top)))
    change(r, *spot)
    return framed(top, rest)


def change_the_metadata(r, data):
    top, rest = header(data)
    metadata = top["__metadata__"]
    name = r.choice(list(metadata))
    if name == "format":
        return framed({**top, "__metadata__": {**metadata, "format": r.choice(["np", ""])}}, rest)
    described = [json.loads(metadata[name])]
    change(r, *r.choice(list(spots(described))))
    metadata[name] = json.dumps(described[0] if described else None)
    return framed(top, rest)


def rename(r, data):
    top, rest = header(data)
    old, new = r.choice(list(top)), r.choice(list(top) + ["other", "model.up._weight_scale"])
    top[new] = top.pop(old)
    return framed(top, rest)


def spots(value):
    """Every place in nested JSON: the container and the key."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from spots(value[key])


def change(r, container, key):
    old = container[key]
    new = [
        None,
        -1,
        0,
        1,
        32,
        64,
        2**40,
        2**63,
        1.5,
        True,
        "",
        "F16",
        "I8",
        "U8",
        "float16",
        [],
        {},
    ]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        new += [old + 1, old - 1, old * 2, old // 2, -old]
    if isinstance(old, list) and old:
        new += [old[::-1], old[1:], old + old[:1]]
    if isinstance(old, str) and len(old) > 1:
        new += [old[:-1], old[1:], old.upper()]
    container[key] = r.choice(new)


DAMAGE = [flip_a_bit, change_a_byte, cut, drop, insert, exchange, change_the_header,
          change_the_metadata, rename]  # fmt: skip


# --- the run --------------------------------------------------------------------------------------


def same(a, b):
    return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def run(count: int, seed: int, folder: Path) -> Counter:
    """Load ``count`` damaged files; returns how many of each kind were refused and loaded."""
    r = random.Random(seed)
    expected, path = state(), folder / "whole.safetensors"
    int4q.save_file(expected, path)
    whole = path.read_bytes()
    seen: Counter = Counter()
    for i in range(count):
        sealed, damage = i % 4 != 0, DAMAGE[i % len(DAMAGE)]
        data = damage(r, whole if sealed else without_seal(whole))
        path = folder / f"{i % 8}.safetensors"  # (a file that is mapped must not change)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        kind = f"{'sealed' if sealed else 'no seal'}, {damage.__name__}"
        try:
            got = int4q.load_file(path)
        except ValueError:
            seen[f"{kind}: refused"] += 1
            continue
        for name, t in got.items():
            t.dequantize() if isinstance(t, int4q.Int4Tensor) else t.clone()
            if sealed and not same(t, expected[name]):
                raise AssertionError(f"file {i} of seed {seed} ({kind}) gave another {name}")
        if sealed and got.keys() != expected.keys():
            raise AssertionError(f"file {i} of seed {seed} ({kind}) gave other names")
        seen[f"{kind}: loaded"] += 1
    return seen


if __name__ == "__main__":
    count, start = int(sys.argv[1]), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = run(count, int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(folder))
    for kind, number in sorted(result.items()):
        print(f"{number:6}  {kind}")
    print(f"{sum(result.values()):6}  in {time.perf_counter() - start:.0f} s")
