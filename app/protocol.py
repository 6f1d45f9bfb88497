"""uvicorn's HTTP protocol, held to what an embeddings server is asked: no other protocol is ever switched to.

Java's HTTP client and `curl --http2` offer HTTP/2 with every request (`Upgrade: h2c`), as RFC 9110 7.8 lets
them; a server that does not want to ignores it. The parser stops there instead, and takes the body for the
next request (Kludex/uvicorn#2722), which is request smuggling. So the offer is made unreadable to it.
"""

from __future__ import annotations

import re

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 64 * 2**10
"""Bytes of request line and headers; a head that goes on is refused."""

_END = b"\r\n\r\n"
_OFFER = re.compile(rb"(?i)(\r\n)upgrade(?=:)")


class Protocol(HttpToolsProtocol):
    """One connection. Errors below HTTP come in OpenAI's shape too."""

    _head = b""
    _between_requests = True

    def data_received(self, data: bytes) -> None:
        if self._between_requests:
            data = self._head + data
            end = data.find(_END)
            if end < 0:
                if len(data) > LONGEST_HEAD:
                    self.send_400_response("The request's headers are too large.")
                else:
                    self._head = data  # the parser gets a head whole, or an offer could hide in its seams
                return
            self._head = b""
            if b"\r\nupgrade:" in data[:end].lower():
                data = _OFFER.sub(rb"\1ignored", data[: end + 2]) + data[end + 2 :]
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._between_requests = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._between_requests = True
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """CONNECT, or an offer pipelined behind another request: what follows cannot be told apart."""
        self.send_400_response("This server switches to no other protocol.")

    def send_400_response(self, msg: str) -> None:
        error = {"message": msg, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = orjson.dumps({"error": error})
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()
