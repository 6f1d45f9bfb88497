"""Callers of every habit at once: they embed, hang up, and hold each vector against its text, bit for bit."""

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
"""Texts that come again, and so are found in the cache."""
KEPT = 20
"""Samples of what went wrong that are kept to be shown."""
PATIENCE = 20.0
"""Seconds after which an answer is lost: the gateway's own deadline is far below."""
_KNOWN: dict[tuple[str, str, int | None], Vector] = {}
_WORDS = ("风急天高猿啸哀", "渚清沙白鸟飞回", "quick", "brown", "fox", "embedding", "ünïcödé", "🙂", "\0", "a\u2028b")


@dataclass
class Tally:
    """What came of the traffic."""

    requests: int = 0
    vectors: int = 0
    hung_up: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Errors that an injected trouble explains, by status and code."""
    wrong: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    """How many there were of the two before, of which only samples are kept."""

    def note(self, samples: list[str], what: str, sample: str) -> None:
        self.bad[what] += 1
        if len(samples) < KEPT:
            samples.append(sample)


@dataclass(frozen=True)
class Ask:
    """One request, and the texts whose vectors it must get."""

    target: Target
    body: dict[str, Any]
    texts: list[str]


class Caller:
    """One caller among many, seeded. Asks one replica or another."""

    def __init__(self, urls: list[str], targets: list[Target], weather: Weather, tally: Tally, seed: str) -> None:
        self._urls, self._targets, self._weather, self._tally = urls, targets, weather, tally
        self._rng = random.Random(seed)
        self._seed, self._count = seed, 0

    async def call_until(self, end: float, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            await self.call(session, self.ask())
            if self._rng.random() < 0.3:
                await asyncio.sleep(self._rng.uniform(0, 0.05))

    async def see_it_through(self, session: aiohttp.ClientSession) -> None:
        """One request that must go well as far as this caller is concerned."""
        await self.call(session, self.ask(), may_hang_up=False)

    async def call(self, session: aiohttp.ClientSession, ask: Ask, *, may_hang_up: bool = True) -> None:
        """One request, seen through or, now and then, broken off."""
        self._tally.requests += 1
        patience = PATIENCE
        hangs_up = may_hang_up and self._rng.random() < 0.05
        if hangs_up:
            patience = self._rng.choice((0.001, 0.01, 0.05, 0.3)) * self._rng.random()
        start = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                async with session.post(self._rng.choice(self._urls), data=orjson.dumps(ask.body)) as response:
                    status, content = response.status, await response.read()
        except TimeoutError:
            if hangs_up:
                self._tally.hung_up += 1
            else:
                self._tally.note(self._tally.unexplained, "lost", f"{ask.target.model}: no answer in {PATIENCE:g} s")
            return
        except aiohttp.ClientError as error:
            self._tally.note(self._tally.unexplained, "lost", f"{ask.target.model}: {error!r}")
            return
        if status == 200:
            self._verify(ask, content)
        else:
            self._explain(ask, status, content, start)

    def _explain(self, ask: Ask, status: int, content: bytes, start: float) -> None:
        error = orjson.loads(content)["error"]
        if self._weather.explains(status, ask.target.vendors, start, time.monotonic()):
            self._tally.errors[f"{status} {error['code']}"] += 1
        else:
            sample = f"{ask.target.model}: {status} {error['code']}: {error['message']}"
            self._tally.note(self._tally.unexplained, "unexplained", sample)

    def _verify(self, ask: Ask, content: bytes) -> None:
        data = orjson.loads(content)["data"]
        if [row["index"] for row in data] != list(range(len(ask.texts))):
            self._tally.note(self._tally.wrong, "wrong", f"{ask.target.model}: indices of {len(data)} rows")
            return
        for text, row in zip(ask.texts, data, strict=True):
            self._tally.vectors += 1
            expected = self._expected(ask.target, text, ask.body.get("dimensions"))
            if not np.array_equal(_vector(row["embedding"]), expected):
                shown = {name: value for name, value in ask.body.items() if name != "input"}
                self._tally.note(self._tally.wrong, "wrong", f"{shown}: another vector than that of {text!r}")

    def _expected(self, target: Target, text: str, dimensions: int | None) -> Vector:
        """Remembered for the texts that come again."""
        key = (target.model, text, dimensions)
        vector = _KNOWN.get(key)
        if vector is None:
            vector = target.expected(text, dimensions)
            if len(_KNOWN) < 10 * POOL:
                _KNOWN[key] = vector
        return vector

    # --- what is asked for ----------------------------------------------------------------

    def ask(self) -> Ask:
        rng = self._rng
        target = rng.choice(self._targets)
        given, texts = self._input()
        body = {"model": target.model, "input": given}
        if (encoding := rng.choice((None, "float", "base64"))) is not None:
            body["encoding_format"] = encoding
        if (dimensions := rng.choice(target.dimensions)) is not None:
            body["dimensions"] = dimensions
        return Ask(target, body, texts)

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
        """One that may come again from anybody, or one that never comes again."""
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
