"""A limit: a minimal ASGI application that answers with ready-made bytes, under the gateway's own server settings.

python -m bench.bare PORT TEXTS float|base64
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson
import uvicorn

from bench.mock import State
from bench.traffic import Shape, traffic

Message = MutableMapping[str, Any]


class Bare:
    """Reads the request's body and always sends the same response."""

    def __init__(self, body: bytes) -> None:
        self._start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        }
        self._body = {"type": "http.response.body", "body": body}

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        assert scope["type"] == "http"
        while (await receive()).get("more_body", False):
            pass
        await send(self._start)
        await send(self._body)


def hot_answer(texts: int, encoding: str) -> bytes:
    """The correct response to a hot request."""
    request = traffic(Shape("hot", texts, encoding)).request(0)
    return b"".join(State().embed(request.split(b"\r\n\r\n", 1)[1]))


if __name__ == "__main__":
    answer = hot_answer(int(sys.argv[2]), sys.argv[3])
    assert orjson.loads(answer)["data"]
    uvicorn.run(
        Bare(answer),
        port=int(sys.argv[1]),
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        lifespan="off",
        ws="none",
    )
