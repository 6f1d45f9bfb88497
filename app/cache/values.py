"""The values stored outside this process: an embedding as bytes that identify their key and reveal corruption.

Layout, little-endian: magic, format version, CRC-32 of everything after it; first 16 bytes of the key, tokens, vector
length in bytes, vector; in version 2 followed by the sparse vector. Anything else read back is a miss, never an error.
"""

from __future__ import annotations

import struct
from zlib import crc32

import orjson

from app import vectors
from app.types import MAX_DIMENSIONS, Embedding

_SEAL = struct.Struct("<4sI")
_DENSE, _SPARSE = b"EGV\x01", b"EGV\x02"
"""Magic and format version."""
_HEAD = struct.Struct("<16sQI")
_VECTOR_START = _SEAL.size + _HEAD.size
_FINGERPRINT_SIZE = 16
MAX_TOKENS = 2**32
"""More than any input costs. A forged count would be charged to callers' limits."""


def encode(key: bytes, embedding: Embedding) -> bytes:
    """The value to store under `key`. Raises `struct.error` for a token count that is negative or exceeds 64 bits."""
    vector, sparse = embedding.vector, embedding.sparse
    body = _HEAD.pack(key[:_FINGERPRINT_SIZE], embedding.tokens, len(vector)) + vector + (sparse or b"")
    return _SEAL.pack(_DENSE if sparse is None else _SPARSE, crc32(body)) + body


def decode(key: bytes, raw: object) -> Embedding | None:
    """The embedding given to `encode(key, …)`, bit for bit; None for anything `encode` did not write under this key,
    and for what no upstream's reply amounts to."""
    if not isinstance(raw, bytes) or len(raw) < _VECTOR_START:
        return None
    version, checksum = _SEAL.unpack_from(raw)
    fingerprint, tokens, length = _HEAD.unpack_from(raw, _SEAL.size)
    end = _VECTOR_START + length
    # A fingerprint of another key comes from a connection out of step, a corrupt index or a hand-made copy.
    if version not in (_DENSE, _SPARSE) or fingerprint != key[:_FINGERPRINT_SIZE] or length % 4 or end > len(raw):
        return None
    if length > 4 * MAX_DIMENSIONS or tokens > MAX_TOKENS:
        return None
    if (version == _DENSE and end != len(raw)) or crc32(memoryview(raw)[_SEAL.size :]) != checksum:
        return None
    # The checksum proves that this is what was written; `fault`, that what was written is an embedding.
    vector = raw[_VECTOR_START:end]
    if version == _DENSE:
        return None if vectors.fault(vector) is not None else Embedding(vector, tokens)
    try:
        sparse = vectors.sparse(orjson.loads(raw[end:]))
    except (KeyError, TypeError, ValueError):
        return None
    return None if vector and vectors.fault(vector) is not None else Embedding(vector, tokens, sparse)
