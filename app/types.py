"""The shared words: what travels between the HTTP face, the pipeline and the wire. No behaviour, no I/O.

Above the batcher everything is an `Embedder` (one caller's request in, its embeddings out); below it
everything is a `BatchEmbedder` (one upstream call's worth of inputs, drawn from any number of requests).

Structs, because these are made, narrowed and compared with every request: each costs a fifth of a dataclass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from enum import StrEnum
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from msgspec import Struct, field

from app.catalog import MediaKind, Model, Role
from app.errors import GatewayError

DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
"""The beginning of a data URI (RFC 2397), up to its base64."""

MAX_DIMENSIONS = 65536
"""More of them make a vector of no model there is; 2**53 and beyond come from JSON as well and mean nothing."""

OutputType: TypeAlias = Literal["dense", "sparse", "dense&sparse"]
Lane: TypeAlias = Literal["query", "bulk"]
OnLongInput: TypeAlias = Literal["error", "truncate", "split"]


class Media(Struct, frozen=True):
    """An image or a video, by its address or (a data URI) by itself. The gateway fetches none."""

    kind: MediaKind
    source: str


Input: TypeAlias = str | Media
"""One thing to embed. Token ids are decoded to text at the door, so that equal texts are equal inputs."""


class Source(StrEnum):
    """Where an input's vector came from, in the words of the metrics."""

    CACHE = "cache"
    INFLIGHT = "inflight"
    UPSTREAM = "upstream"


class Params(Struct, frozen=True):
    """Everything besides the input that may alter its vector. All of it is part of the cache key."""

    dimensions: int | None = None
    input_type: Role | None = None
    output_type: OutputType = "dense"
    instruct: str | None = None


class Caller(Struct, frozen=True):
    """Who asks, as far as the pipeline may know: a name for metrics and logs, a lane, a part of the cache."""

    name: str = "anonymous"
    lane: Lane | None = None
    """None lets the size of the request decide."""
    namespace: str = ""
    """Callers with different ones share neither cached embeddings nor those under way."""


class EmbedRequest(Struct):
    """One caller's request. Stages narrow it (`replace`); nobody changes it in place."""

    model: str
    """The public model's own name, aliases resolved."""
    inputs: Sequence[Input]
    params: Params
    deadline: float
    """On the event loop's clock, seconds."""
    caller: Caller = field(default_factory=Caller)
    media: bool = False
    """Whether any of the inputs is no text."""
    numbers: bool = False
    """Whether the caller wants numbers and not base64: it is worth keeping their text."""
    read_cache: bool = True
    write_cache: bool = True
    keys: Sequence[bytes] = ()
    """Cache keys, one per input, once the cache stage has derived them."""
    held: Collection[bytes] = ()
    """The keys among them that another replica has claimed: it is embedding these inputs."""
    positions: Sequence[int] | None = None
    """Where each input stood in the caller's request, once a stage has left some out or cut some in pieces."""
    on_long_input: OnLongInput | None = None
    """What the caller wants done with an input longer than the model takes; None leaves it to the model."""
    collect_too_long: bool = False
    """Whether an input that turns out too long is left for the stage that asked (`EmbedResult.too_long`), and
    not an error of the whole request."""

    @property
    def shareable(self) -> bool:
        """Whether replicas share the work on it. A request that reads no cache cannot wait for what another replica
        embeds, and nobody can wait for one that writes none."""
        return self.read_cache and self.write_cache


class Embedding(Struct, gc=False):
    """A vector and what its input cost.

    `vector` is float32, little-endian, from the moment a reply is parsed until a response is written.
    Shared between requests and the memory cache: treat it as frozen.
    """

    vector: bytes
    """Empty where only a sparse one was asked for."""
    tokens: int
    sparse: bytes | None = None
    """The sparse vector, where one was asked for: a JSON array of `{"index", "value", "token"}`."""
    text: bytes | None = None
    """The numbers as a JSON array, where the memory cache keeps it too."""

    @property
    def size(self) -> int:
        """Bytes in it, but for the text."""
        return len(self.vector) if self.sparse is None else len(self.vector) + len(self.sparse)


class EmbedResult(Struct):
    """A request's embeddings in input order, and how they came about."""

    embeddings: list[Embedding]
    sources: list[Source]
    calls: int = 0
    """Upstream calls this request took part in, retries included."""
    deployments: tuple[str, ...] = ()
    """`upstream/model` of those that served it, in order of first use."""
    too_long: dict[int, GatewayError] = field(default_factory=dict)
    """Inputs, by place, that the upstream found too long, where the request spares them; their embeddings are
    `NO_EMBEDDING`."""
    truncated: int = 0
    """Inputs of which only the beginning was embedded."""
    split: int = 0
    """Inputs that were embedded in pieces."""
    cached_tokens: int = 0
    shared_tokens: int = 0
    """Of inputs that were embedded in pieces, some of which did cost: tokens of the pieces that were found in the
    cache, and of those that were asked once for several."""


NO_EMBEDDING = Embedding(b"", 0)
"""Stands where an input has no embedding (yet)."""


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
    """Whether what comes back may be cached."""
    deadline: float
    completed: dict[bytes, Embedding] | None = None
    """By key, what the finished calls of a batch that takes several have brought: kept where the deadline cuts off the
    others. None while there is one call."""
    still_wanted: Callable[[], bool] = lambda: True
    """Whether anybody still waits for any of it."""
    later_deadline: Callable[[], float] = lambda: math.inf
    """The earliest deadline, later than the batch's own, of an input that callers have joined since; infinite where
    there is none."""


class BatchResult(Struct):
    """One outcome per input, in the batch's order; an input that is refused fails alone."""

    outcomes: list[Embedding | GatewayError]
    calls: int = 1
    late: bool = False
    """Whether what failed might have been embedded before a later deadline."""
    deployments: tuple[str, ...] = ()
    """Names of those that embedded it; the route fills them in."""


class BatchEmbedder(Protocol):
    """A stage below the batcher. Raises `GatewayError` when the whole batch failed; a deployment's outermost one
    (`app.pipeline.adapt`) does not, and then has that as each input's outcome."""

    async def __call__(self, batch: Batch) -> BatchResult: ...


# --- the wire ---------------------------------------------------------------------------------------


MAX_REPLY = 256 * 2**20
"""Bytes that any reply may have. 2,048 vectors of 3,072 numbers are 160 MB as text."""


class WireRequest(Struct):
    """An HTTP request as plain data. `headers` have lower-case names; `query` is appended encoded."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    query: dict[str, str] = field(default_factory=dict)
    max_reply: int = MAX_REPLY
    """Bytes that its reply may have."""


class WireReply(Struct):
    """An HTTP response as plain data, read to its end. `headers` have lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes | bytearray
    """Held by the reply alone, and not to be changed: a long one is passed on as it was received, without a copy."""


Send: TypeAlias = Callable[[WireRequest], Awaitable[WireReply]]
"""Performs one HTTP exchange. Raises `UpstreamUnreachable`, `UpstreamTimeout`, `UpstreamInvalidResponse`."""


class Auth(Protocol):
    """Puts credentials on a request and sends it. May send requests of its own first (a token), or the
    same one again (a token that had expired). Knows no adapter, and no adapter knows it."""

    async def __call__(self, request: WireRequest, send: Send) -> WireReply: ...


class Target(Struct, frozen=True):
    """Where a batch goes: one model behind an upstream."""

    base_url: str
    """Without a trailing slash."""
    model: Model


class Parsed(Struct):
    """What an adapter read from a reply, unchecked: `indexes[i]` is the place in the batch of `vectors[i]`."""

    indexes: Sequence[int]
    vectors: Sequence[bytes]
    """Empty ones where only sparse vectors were asked for."""
    tokens: int | None = None
    """The batch's bill as the upstream states it, or None where it states none."""
    sparse: Sequence[object] | None = None
    """As the upstream gives them, one for each of `vectors`; None where none were asked for."""


class Adapter(Struct, frozen=True):
    """An upstream's dialect: three pure functions. No I/O, no clock, no retry, no batching, no check.

    `parse_error` sees every reply, whatever its status, and returns None for a success.
    `parse_response` may raise `KeyError`, `TypeError`, `ValueError` or `IndexError` on a reply of the
    wrong shape: the caller turns these into `UpstreamInvalidResponse`.
    """

    build_request: Callable[[Batch, Target], WireRequest]
    parse_error: Callable[[WireReply], GatewayError | None]
    parse_response: Callable[[WireReply, Batch], Parsed]
    capabilities: frozenset[str] = frozenset()
    """Which of `app.config.settings.CAPABILITIES` it can tell a model, or ask of it."""


class TokenStore(Protocol):
    """Where replicas share access tokens, sealed. Never raises: what goes wrong is a token that is fetched again."""

    async def get(self, name: bytes) -> bytes | None: ...

    async def put(self, name: bytes, sealed: bytes, seconds: float) -> None: ...

    async def claim(self, name: bytes, seconds: float) -> bool:
        """Claims the fetching of a new token for so many seconds, or until `release`. Whether the caller has it now;
        also true where the store does not answer."""
        ...

    async def release(self, name: bytes) -> None: ...


class Store(Protocol):
    """One cache tier. Never raises into a request: what goes wrong is a miss, logged and counted."""

    name: str

    @property
    def status(self) -> str:
        """ "up", or what is wrong with it."""
        ...

    async def close(self) -> None: ...


LookupResult: TypeAlias = tuple[list[Embedding | None], Collection[bytes]]
"""One answer per key; and the keys of what is missing and another replica has claimed."""


@runtime_checkable
class SlowStore(Store, Protocol):
    """A tier that is waited for."""

    at_once: int
    """How many look-ups of a few keys it may have under way."""

    def time_limit(self, keys: int, /) -> float:
        """Seconds a look-up of so many keys may take."""
        ...

    async def open(self) -> None:
        """Gets ready ahead of the first request, so that `status` is true from the start. Never fails."""
        ...

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """One look-up for all keys; the answer is as long as `keys`."""
        ...

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Keep these. May drop any of them."""
        ...


@runtime_checkable
class SharedStore(SlowStore, Protocol):
    """A tier of all replicas, who tell each other there what they are embedding. Never raises either."""

    async def get_or_claim(self, keys: Sequence[bytes]) -> LookupResult:
        """As `get`. What is missing and not claimed yet is then claimed for this replica, for `CLAIM_TTL` seconds at
        most; where the tier cannot do that, nothing is."""
        ...

    async def release_claims(self, keys: Sequence[bytes]) -> None:
        """Ends this replica's claims on keys for which no embedding will come."""
        ...


CLAIM_TTL = 3.0
"""Seconds a claim lasts: longer than most calls take, and short of the 5 that httpx waits by default, for its owner may
have died."""
