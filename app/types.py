"""Shared types: what travels between the HTTP layer, the pipeline and the wire. No behaviour, no I/O.

Every stage above the batcher is an `Embedder` (one caller's request in, its embeddings out); every stage below it is a
`BatchEmbedder` (one upstream call's worth of inputs, drawn from any number of requests).

Structs, because these are created, copied and compared on every request: each costs a fifth of a dataclass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from enum import StrEnum
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct, field

from app.catalog import MediaKind, Model, Role
from app.errors import GatewayError

DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
"""The prefix of a base64 data URI (RFC 2397), up to the data."""

MAX_DIMENSIONS = 65536
"""No known model has more. The bound also keeps out the meaningless integers of 2**53 and above that JSON can carry."""

OutputType: TypeAlias = Literal["dense", "sparse", "dense&sparse"]
Lane: TypeAlias = Literal["query", "bulk"]
OnLongInput: TypeAlias = Literal["error", "truncate", "split"]


BULK = 16
"""A request with more inputs than this is bulk work unless its API key says otherwise."""


class Media(Struct, frozen=True):
    """An image or a video, given as a URL or as a data URI. The gateway never fetches it."""

    kind: MediaKind
    source: str


Input: TypeAlias = str | Media
"""One thing to embed. Token ids are decoded to text on arrival, so that equal texts are equal inputs."""


class Source(StrEnum):
    """Where an input's vector came from, as the metrics label it."""

    CACHE = "cache"
    INFLIGHT = "inflight"
    UPSTREAM = "upstream"


class Params(Struct, frozen=True):
    """Everything besides the input that may affect its vector. Every field is part of the cache key."""

    dimensions: int | None = None
    input_type: Role | None = None
    output_type: OutputType = "dense"
    instruct: str | None = None


class Caller(Struct, frozen=True):
    """The caller, as far as the pipeline may know: a name for metrics and logs, a lane, a cache namespace."""

    name: str = "anonymous"
    lane: Lane | None = None
    """None: decided by the size of the request."""
    namespace: str = ""
    """Callers in different namespaces share neither cached embeddings nor those in flight."""


class EmbedRequest(Struct):
    """One caller's request. Stages derive a new one (`replace`); nobody modifies it in place."""

    model: str
    """The public model's name, aliases resolved."""
    inputs: Sequence[Input]
    params: Params
    deadline: float
    """Seconds, on the event loop's clock."""
    caller: Caller = field(default_factory=Caller)
    media: bool = False
    """Whether any of the inputs is not text."""
    numbers: bool = False
    """Whether the caller wants numbers rather than base64: then their text is worth caching."""
    read_cache: bool = True
    write_cache: bool = True
    keys: Sequence[bytes] = ()
    """Cache keys, one per input, once `CacheRead` has derived them."""
    held: Collection[bytes] = ()
    """Those of `keys` that another replica has claimed: it is embedding these inputs."""
    positions: Sequence[int] | None = None
    """Each input's index in the caller's request, once a stage has left some out or split some; None until then."""
    on_long_input: OnLongInput | None = None
    """What to do with an input longer than the model takes; None: as the model is configured."""
    collect_too_long: bool = False
    """Whether inputs that the upstream finds too long are returned in `EmbedResult.too_long`, instead of failing the
    whole request."""

    @property
    def lane(self) -> Lane:
        """The caller's lane, or else the one for requests of this size."""
        return self.caller.lane or ("bulk" if len(self.inputs) > BULK else "query")

    @property
    def shareable(self) -> bool:
        """Whether replicas may share the work on it. A request that does not read the cache cannot wait for another
        replica's embeddings, and no replica can wait for one that does not write it."""
        return self.read_cache and self.write_cache


class Embedding(Struct, gc=False):
    """A vector, and the tokens its input cost.

    `vector` is float32, little-endian, from the moment a reply is parsed until a response is written. Shared between
    requests and the memory cache: treat it as immutable.
    """

    vector: bytes
    """Empty if only a sparse vector was requested."""
    tokens: int
    sparse: bytes | None = None
    """The sparse vector, if one was requested: a JSON array of `{"index", "value", "token"}`."""
    text: bytes | None = None
    """`vector` as a JSON array of numbers, if the memory cache keeps that too."""

    @property
    def size(self) -> int:
        """Bytes of its vectors, not counting `text`."""
        return len(self.vector) if self.sparse is None else len(self.vector) + len(self.sparse)


class EmbedResult(Struct):
    """A request's embeddings, in input order, and where they came from."""

    embeddings: list[Embedding]
    sources: list[Source]
    calls: int = 0
    """Upstream calls this request took part in, retries included."""
    deployments: tuple[str, ...] = ()
    """`upstream/model` of each deployment that served it, in order of first use."""
    too_long: dict[int, GatewayError] = field(default_factory=dict)
    """By index, the errors of inputs that the upstream found too long, if the request sets `collect_too_long`; their
    embeddings are `NO_EMBEDDING`."""
    truncated: int = 0
    """Number of inputs of which only the beginning was embedded."""
    split: int = 0
    """Number of inputs that were embedded in pieces."""
    cached_tokens: int = 0
    shared_tokens: int = 0
    """Of inputs embedded in pieces, at least one of which was billed: tokens of the pieces found in the cache, and of
    those that shared an embedding in flight."""


NO_EMBEDDING = Embedding(b"", 0)
"""Placeholder where an input has no embedding, or none yet."""


class Embedder(Protocol):
    """A stage, or the whole pipeline. Raises `GatewayError`."""

    async def __call__(self, request: EmbedRequest) -> EmbedResult: ...


class Batch(Struct):
    """What one upstream call carries: inputs with equal parameters, from any number of requests."""

    model: str
    inputs: Sequence[Input]
    keys: Sequence[bytes]
    params: Params
    store: bool
    """Whether the result may be cached."""
    deadline: float
    completed: dict[bytes, Embedding] | None = None
    """By key, the embeddings from completed calls of a batch that takes several: kept when the deadline cuts off the
    rest. None while the batch is a single call."""
    still_wanted: Callable[[], bool] = lambda: True
    """Whether any caller still waits for any of its inputs."""
    shared: Callable[[], bool] = lambda: False
    """Whether its inputs are not all waited for by the same callers."""
    on_further_call: Callable[[], None] = lambda: None
    """Called before each call but the first of a batch that takes several."""
    later_deadline: Callable[[], float] = lambda: math.inf
    """The earliest deadline after the batch's own among callers that have joined its inputs since; infinite if there is
    none."""


class BatchResult(Struct):
    """One outcome per input, in batch order; an input that is refused fails alone."""

    outcomes: list[Embedding | GatewayError]
    calls: int = 1
    late: bool = False
    """Whether what failed might have succeeded with a later deadline."""
    deployments: tuple[str, ...] = ()
    """Names of the deployments that embedded it; filled in by the route."""


class BatchEmbedder(Protocol):
    """A stage below the batcher. Raises `GatewayError` when the whole batch fails; only a deployment's outermost stage
    (`app.pipeline.adapt`) never does, and returns the error as every input's outcome."""

    async def __call__(self, batch: Batch) -> BatchResult: ...


# --- the wire ---------------------------------------------------------------------------------------


MAX_REPLY = 256 * 2**20
"""Maximum bytes of any reply. 2,048 vectors of 3,072 numbers are 160 MB as text."""


class WireRequest(Struct):
    """An HTTP request as plain data. Header names are lower-case; `query` is encoded and appended to `url`."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    query: dict[str, str] = field(default_factory=dict)
    max_reply: int = MAX_REPLY
    """Maximum bytes of its reply."""


class WireReply(Struct):
    """An HTTP response as plain data, read to its end. Header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes | bytearray
    """Owned by the reply and not to be modified: a long body is passed on as received, without a copy."""


Send: TypeAlias = Callable[[WireRequest], Awaitable[WireReply]]
"""Performs one HTTP exchange. Raises `UpstreamUnreachable`, `UpstreamTimeout`, `UpstreamInvalidResponse`."""


class Auth(Protocol):
    """Adds credentials to a request and sends it. May first send requests of its own (to fetch a token), or repeat this
    one (when a token has expired). Knows no adapter, and no adapter knows it."""

    async def __call__(self, request: WireRequest, send: Send) -> WireReply: ...


class Target(Struct, frozen=True):
    """Where a batch goes: one model behind an upstream."""

    base_url: str
    """Without a trailing slash."""
    model: Model


class Parsed(Struct):
    """What an adapter read from a reply, unchecked: `vectors[i]` belongs to the batch's input `indexes[i]`."""

    indexes: Sequence[int]
    vectors: Sequence[bytes]
    """Empty ones if only sparse vectors were requested."""
    tokens: int | None = None
    """The batch's tokens as the upstream reports them; None if it reports none."""
    sparse: Sequence[object] | None = None
    """As the upstream returned them, one for each of `vectors`; None if none were requested."""
    model: object = None
    """What the reply names as the model; None if it names none."""


class Adapter(Struct, frozen=True):
    """An upstream's dialect: three pure functions. No I/O, no clock, no retry, no batching, no validation.

    `parse_error` sees every reply, whatever its status, and returns None for a success. `parse_response` may raise
    `KeyError`, `TypeError`, `ValueError` or `IndexError` on a reply of the wrong shape: the caller turns these into
    `UpstreamInvalidResponse`.
    """

    build_request: Callable[[Batch, Target], WireRequest]
    parse_error: Callable[[WireReply], GatewayError | None]
    parse_response: Callable[[WireReply, Batch], Parsed]
    capabilities: frozenset[str] = frozenset()
    """Which of `app.config.settings.CAPABILITIES` the dialect can express."""


class TokenStore(Protocol):
    """Where replicas share access tokens, sealed. Never raises: if it fails, a token is fetched again."""

    async def get(self, name: bytes) -> bytes | None: ...

    async def put(self, name: bytes, sealed: bytes, seconds: float) -> None: ...

    async def claim(self, name: bytes, seconds: float) -> bool:
        """Claims the fetching of a new token, for `seconds` or until `release`. Returns whether the caller now has the
        claim; also true if the store does not answer."""
        ...

    async def release(self, name: bytes) -> None: ...
