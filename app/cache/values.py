"""What a tier outside this process keeps: an embedding as bytes that prove whose they are and that they are whole.

Layout, little-endian: magic, format version, CRC-32 of all that follows it; first 16 bytes of the key, tokens, vector
length in bytes, vector; in version 2 the sparse vector behind it. Anything else read back is no value: a miss, never
an error.
"""

from __future__ import annotations

import struct
from zlib import crc32

import orjson

from app import vectors
from app.types import Embedding

_SEAL = struct.Struct("<4sI")
_DENSE, _SPARSE = b"EGV\x01", b"EGV\x02"
"""Magic and format version."""
_HEAD = struct.Struct("<16sQI")
_START = _SEAL.size + _HEAD.size
_FINGERPRINT = 16


def encode(key: bytes, embedding: Embedding) -> bytes:
    """The value to keep under `key`. Raises `struct.error` for a token count that is negative or beyond 64 bits."""
    vector, sparse = embedding.vector, embedding.sparse
    body = _HEAD.pack(key[:_FINGERPRINT], embedding.tokens, len(vector)) + vector + (sparse or b"")
    return _SEAL.pack(_DENSE if sparse is None else _SPARSE, crc32(body)) + body


def decode(key: bytes, raw: object) -> Embedding | None:
    """What `encode(key, …)` was given, bit for bit, or None for anything that was not written so."""
    if not isinstance(raw, bytes) or len(raw) < _START:
        return None
    seal, checksum = _SEAL.unpack_from(raw)
    fingerprint, tokens, length = _HEAD.unpack_from(raw, _SEAL.size)
    end = _START + length
    # Another key's value under this key: a connection out of step, a corrupt index, a hand-made copy.
    if seal not in (_DENSE, _SPARSE) or fingerprint != key[:_FINGERPRINT] or length % 4 or end > len(raw):
        return None
    if (seal == _DENSE and end != len(raw)) or crc32(memoryview(raw)[_SEAL.size :]) != checksum:
        return None
    # The sum says that it is what was written; this, that what was written is an embedding.
    vector = raw[_START:end]
    if seal == _DENSE:
        return None if vectors.fault(vector) is not None else Embedding(vector, tokens)
    try:
        sparse = vectors.sparse(orjson.loads(raw[end:]))
    except (KeyError, TypeError, ValueError):
        return None
    return None if vector and vectors.fault(vector) is not None else Embedding(vector, tokens, sparse)
