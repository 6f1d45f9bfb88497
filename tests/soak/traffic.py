"""Concurrent callers of every kind: they embed texts, hang up, and compare each vector with its text's, bit for bit."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import orjson

from app import tokens
from tests.fakes import Vector
from tests.soak.vendors import Target
from tests.soak.weather import Weather

POOL = 400
"""Number of texts that are sent again and again, and so are found in the cache."""
KEPT = 20
"""Samples kept of each kind of failure."""
PATIENCE = 20.0
"""Seconds after which an answer counts as lost; the gateway's own deadline is far shorter."""
_KNOWN: dict[tuple[str, str, int | None], Vector] = {}
_WORDS = ("风急天高猿啸哀", "渚清沙白鸟飞回", "quick", "brown", "fox", "embedding", "ünïcödé", "🙂", "\0", "a\u2028b")


@dataclass
class Tally:
    """The outcome of the traffic."""

    requests: int = 0
    vectors: int = 0
    hung_up: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Errors that an injected fault explains, by status and code."""
    wrong: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    """How many there were of each kind; `wrong` and `unexplained` keep only samples."""

    def note(self, samples: list[str], what: str, sample: str) -> None:
        self.bad[what] += 1
        if len(samples) < KEPT:
            samples.append(sample)


@dataclass(frozen=True)
class Request:
    """One request, and the texts whose vectors it must get."""

    target: Target
    body: dict[str, Any]
    texts: list[str]


class Caller:
    """One caller among many, seeded; each request goes to a random replica."""

    def __init__(self, urls: list[str], targets: list[Target], weather: Weather, tally: Tally, seed: str) -> None:
        self._urls, self._targets, self._weather, self._tally = urls, targets, weather, tally
        self._rng = random.Random(seed)
        self._seed, self._count = seed, 0

    async def call_until(self, end: float, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            await self.call(session, self.make_request())
            if self._rng.random() < 0.3:
                await asyncio.sleep(self._rng.uniform(0, 0.05))

    async def see_it_through(self, session: aiohttp.ClientSession) -> None:
        """One request that this caller does not abandon."""
        await self.call(session, self.make_request(), may_hang_up=False)

    async def call(self, session: aiohttp.ClientSession, request: Request, *, may_hang_up: bool = True) -> None:
        """One request, abandoned now and then unless `may_hang_up` is false."""
        self._tally.requests += 1
        patience = PATIENCE
        hangs_up = may_hang_up and self._rng.random() < 0.05
        if hangs_up:
            patience = self._rng.choice((0.001, 0.01, 0.05, 0.3)) * self._rng.random()
        start = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                async with session.post(self._rng.choice(self._urls), data=orjson.dumps(request.body)) as response:
                    status, content = response.status, await response.read()
        except TimeoutError:
            if hangs_up:
                self._tally.hung_up += 1
            else:
                self._tally.note(
                    self._tally.unexplained, "lost", f"{request.target.model}: no answer in {PATIENCE:g} s"
                )
            return
        except aiohttp.ClientError as error:
            self._tally.note(self._tally.unexplained, "lost", f"{request.target.model}: {error!r}")
            return
        if status == 200:
            self._verify(request, content)
        else:
            self._explain(request, status, content, start)

    def _explain(self, request: Request, status: int, content: bytes, start: float) -> None:
        error = orjson.loads(content)["error"]
        if self._weather.explains(status, request.target.vendors, start, time.monotonic()):
            self._tally.errors[f"{status} {error['code']}"] += 1
        else:
            sample = f"{request.target.model}: {status} {error['code']}: {error['message']}"
            self._tally.note(self._tally.unexplained, "unexplained", sample)

    def _verify(self, request: Request, content: bytes) -> None:
        data = orjson.loads(content)["data"]
        if [row["index"] for row in data] != list(range(len(request.texts))):
            self._tally.note(self._tally.wrong, "wrong", f"{request.target.model}: indices of {len(data)} rows")
            return
        for text, row in zip(request.texts, data, strict=True):
            self._tally.vectors += 1
            expected = self._expected(request.target, text, request.body.get("dimensions"))
            if not np.array_equal(_vector(row["embedding"]), expected):
                shown = {name: value for name, value in request.body.items() if name != "input"}
                self._tally.note(self._tally.wrong, "wrong", f"{shown}: another vector than that of {text!r}")

    def _expected(self, target: Target, text: str, dimensions: int | None) -> Vector:
        """Remembers the vectors of texts that are sent again."""
        key = (target.model, text, dimensions)
        vector = _KNOWN.get(key)
        if vector is None:
            vector = target.expected(text, dimensions)
            if len(_KNOWN) < 10 * POOL:
                _KNOWN[key] = vector
        return vector

    # --- requests -------------------------------------------------------------------------

    def make_request(self) -> Request:
        rng = self._rng
        target = rng.choice(self._targets)
        value, texts = self._input()
        body = {"model": target.model, "input": value}
        if (encoding := rng.choice((None, "float", "base64"))) is not None:
            body["encoding_format"] = encoding
        if (dimensions := rng.choice(target.dimensions)) is not None:
            body["dimensions"] = dimensions
        return Request(target, body, texts)

    def _input(self) -> tuple[Any, list[str]]:
        rng = self._rng
        kind = rng.choices(("text", "few", "bulk", "duplicates", "ids", "lists of ids"), (8, 4, 1, 2, 1, 1))[0]
        if kind == "text":
            text = self._text()
            return text, [text]
        if kind == "ids":
            ids = self._ids()
            return ids, [tokens.decode(ids)]
        if kind == "lists of ids":
            lists = [self._ids() for _ in range(rng.randint(1, 5))]
            return lists, [tokens.decode(ids) for ids in lists]
        texts = [self._text() for _ in range(rng.randint(40, 150) if kind == "bulk" else rng.randint(1, 12))]
        if kind == "duplicates":
            texts = [rng.choice(texts) for _ in range(3 * len(texts))]
        return texts, texts

    def _text(self) -> str:
        """Either one of `POOL` texts that all callers share, or one that is never sent again."""
        if self._rng.random() < 0.6:
            return _common(self._rng.randrange(POOL))
        self._count += 1
        return f"{self._seed} {self._count} {self._rng.choice(_WORDS)}"

    def _ids(self) -> list[int]:
        return [self._rng.randrange(300, 5000) for _ in range(self._rng.randint(1, 12))]


def _common(number: int) -> str:
    rng = random.Random(number)
    return f"{number} " + " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 5)))


def _vector(shown: str | list[float]) -> Vector:
    if isinstance(shown, str):
        return np.frombuffer(base64.b64decode(shown), "<f4")
    return np.array(shown, "<f4")
