"""Seeds of sampled requests that bring none: drawn at random, or derived from the request.

A seed is below 2**52. With the index of an answer added (n > 1), it stays below 2**53, which every JSON reader keeps
exactly.
"""

import dataclasses
import enum
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

LIMIT = 1 << 52
REMEMBERED = 65_536


def drawn() -> int:
    """A seed from the system's source of randomness, in [0, LIMIT)."""
    return secrets.randbelow(LIMIT)


class Derived:
    """Derives seeds from requests. The k-th of identical requests gets the k-th seed, whatever arrives in between.

    engine_seed: the engine's seed. remembered: how many different requests are counted. Beyond it, the request that
    was not seen for the longest time is forgotten: when it comes again, it counts from 0, and gets its first seeds
    again. Not thread-safe: one thread reads the requests of an engine core.
    """

    def __init__(self, engine_seed: int, remembered: int = REMEMBERED) -> None:
        self._engine_seed, self._remembered = engine_seed, remembered
        self._seen: OrderedDict[bytes, int] = OrderedDict()

    def key(self, *request: Any) -> bytes:
        """What identical requests share. request: its parts: prompt, parameters and the like. See `digest`."""
        return digest(self._engine_seed, *request)

    def seed(self, key: bytes) -> int:
        """The seed of the next request with this key."""
        count = self._seen.pop(key, 0)
        self._seen[key] = count + 1
        if len(self._seen) > self._remembered:
            self._seen.popitem(last=False)
        return nth(key, count)


def nth(key: bytes, count: int) -> int:
    """The seed of the request that comes after `count` identical ones. key: their digest."""
    return int.from_bytes(hashlib.sha256(key + count.to_bytes(8, "little")).digest()[:8], "little") % LIMIT


def digest(*parts: Any) -> bytes:
    """16 bytes that name the parts: numbers, texts, bytes, lists, sets, dicts, tensors, and objects of fields.

    Of an object only the public fields count. The order of a set and of a dict does not count.
    """
    held = hashlib.sha256()
    for piece in _pieces(parts):
        held.update(len(piece).to_bytes(8, "little") + piece)
    return held.digest()[:16]


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield from _sorted(b"dict", ((k, v) for k, v in value.items()))
    elif isinstance(value, (set, frozenset)):
        yield from _sorted(b"set", value)
    elif isinstance(value, (list, tuple)):
        yield b"list" + str(len(value)).encode()
        if value and all(type(item) is int for item in value):  # token ids: many of them
            yield repr(list(value)).encode()
        else:
            for item in value:
                yield from _pieces(item)
    elif isinstance(value, enum.Enum):
        yield repr(value.name).encode()
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode()
    elif hasattr(value, "untyped_storage"):
        yield from _tensor(value)
    else:
        yield from _sorted(b"fields", _public(value))


def _sorted(kind: bytes, items: Any) -> Iterator[bytes]:
    yield kind
    yield from sorted(digest(item) for item in items)


def _public(value: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass, or of another class that lists its fields."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = list(getattr(value, "__struct_fields__", ()))
    if not names:
        raise TypeError(f"a request holds {type(value).__name__}, from which no seed can be derived")
    return [(name, getattr(value, name)) for name in names if not name.startswith("_")]


def _tensor(value: Any) -> Iterator[bytes]:
    import torch

    held = value.detach().contiguous().cpu()
    yield f"{held.dtype} {list(held.shape)}".encode()
    yield held.reshape(-1).view(torch.uint8).numpy().tobytes()
