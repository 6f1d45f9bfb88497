"""Over an httpx transport that is handed in, as `create_app` takes one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamTimeout, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams.client import Client

ASKED = WireRequest("POST", "http://up.invalid/embeddings", body=b"{}", max_reply=8)


async def told(answer: httpx.Response | httpx.TransportError) -> WireReply:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.content == ASKED.body
        if isinstance(answer, httpx.TransportError):
            raise answer
        return answer

    client = Client(httpx.MockTransport(handle), timeout=30)
    try:
        return await client.send(ASKED)
    finally:
        await client.aclose()


@pytest.mark.parametrize("how", [{"content": b"12345678"}, {"stream": httpx.ByteStream(b"12345678")}])
async def test_a_reply_may_be_there_whole_or_come_in_pieces(how: dict[str, Any]) -> None:
    reply = await told(httpx.Response(201, headers={"X-Told": "yes"}, **how))
    assert (reply.status, reply.headers["x-told"], reply.body) == (201, "yes", b"12345678")


async def test_a_reply_is_bounded() -> None:
    with pytest.raises(UpstreamInvalidResponse, match="larger than 8 bytes"):
        await told(httpx.Response(200, content=b"123456789"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError, UpstreamUnreachable),
        (httpx.ConnectTimeout, UpstreamUnreachable),
        (httpx.ReadTimeout, UpstreamTimeout),
        (httpx.ReadError, UpstreamUnreachable),
        (httpx.RemoteProtocolError, UpstreamUnreachable),
    ],
)
async def test_trouble_is_told_in_our_words_and_without_the_address(
    error: type[httpx.TransportError], kind: type[GatewayError]
) -> None:
    with pytest.raises(kind) as caught:
        await told(error("http://up.invalid/?key=canary"))
    assert "canary" not in caught.value.message
