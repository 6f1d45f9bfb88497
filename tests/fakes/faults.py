"""Faults that a fake upstream plays on demand: on the socket, in the reply, in the vectors.

Four kinds. `Answer` replaces the reply verbatim. `VendorError` replaces it by an error in the
vendor's own shape. `Wire` decides what happens on the socket with the good reply. `Payload`
changes the vectors of the good reply, whatever the vendor. Nothing here knows a vendor.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .vectors import Row
from .wire import Connection, Reply, body_bytes


class Fault:
    """Base of all faults; `name` is what `Call.fault` shows."""

    name: str


@dataclass(frozen=True)
class Answer(Fault):
    """Answer with this reply, verbatim."""

    name: str
    reply: Reply


@dataclass(frozen=True)
class VendorError(Fault):
    """Answer with an error of the vendor's table (or one of the fake's `aliases`)."""

    name: str
    message: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


Play = Callable[[Connection, Reply], Awaitable[bool]]
After = Callable[[Connection], Awaitable[None]]


async def _no_op(connection: Connection) -> None:
    pass


@dataclass(frozen=True)
class Wire(Fault):
    """Play on the socket; `play` returns whether the connection may be used again.

    `bills`: the vendor has computed the vectors and charges for them, though they never arrive.
    `after` is played once the call counts as ended.
    """

    name: str
    play: Play
    bills: bool = True
    after: After = _no_op


@dataclass(frozen=True)
class Payload(Fault):
    """Change the rows of a good reply."""

    name: str
    change: Callable[[list[Row], str | None], list[Row]]
    text: str | None = None

    def on(self, text: str) -> "Payload":
        """Return the same fault applied to the rows of this text instead of the first row."""
        return replace(self, text=text)


# --- replies -------------------------------------------------------------------------------


def http_error(
    status: int,
    body: str | bytes | Mapping[str, Any] | list[Any] = b"",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Answer with this status, body and headers, verbatim."""
    return Answer(f"http_{status}", Reply(status, body_bytes(body), dict(headers or {})))


def vendor_error(
    name: str | int,
    message: str | None = None,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> VendorError:
    """Answer with the vendor's error of this name; ``status=200`` gives an error inside a 200."""
    return VendorError(str(name), message, status, dict(headers or {}))


def html_page(status: int = 502) -> Answer:
    """Answer as the load balancer in front of a dead service does."""
    page = f"<html><head><title>{status}</title></head><body><center>nginx</center></body></html>"
    return Answer("html_page", Reply(status, page.encode(), {"Content-Type": "text/html"}))


def redirect(url: str, status: int = 302) -> Answer:
    """Send the caller, and its key if it is careless, somewhere else."""
    return Answer("redirect", Reply(status, b"", {"Location": url}))


invalid_json = Answer("invalid_json", Reply(200, b'{"object":"list","data":[{"embedding":[0.1,'))
empty_body = Answer("empty_body", Reply(200, b""))
json_null = Answer("json_null", Reply(200, b"null"))


# --- the socket ----------------------------------------------------------------------------


async def _reset_before_answer(connection: Connection, reply: Reply) -> bool:
    connection.reset()
    return False


async def _reset_mid_body(connection: Connection, reply: Reply) -> bool:
    await connection.write(reply.head() + reply.body[: len(reply.body) // 2])
    connection.reset()
    return False


async def _truncated_body(connection: Connection, reply: Reply) -> bool:
    await connection.write(reply.head() + reply.body[: len(reply.body) // 2])
    return False


async def _truncated_chunks(connection: Connection, reply: Reply) -> bool:
    half = reply.body[: len(reply.body) // 2]
    chunk = f"{len(half):x}\r\n".encode() + half + b"\r\n"  # without the final chunk of length 0
    await connection.write(reply.head("Transfer-Encoding: chunked") + chunk)
    return False


async def _hang(connection: Connection, reply: Reply) -> bool:
    await connection.gone.wait()
    return False


async def _endless_body(connection: Connection, reply: Reply) -> bool:
    await connection.write(reply.head("Transfer-Encoding: chunked"))
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"  # white space: no parser objects before the end
    while not connection.gone.is_set():
        await connection.write(chunk)
    return False


async def _close_after_answer(connection: Connection, reply: Reply) -> bool:
    await connection.send(reply)
    return False


async def _reset_on_next_byte(connection: Connection) -> None:
    await connection.wait_for_byte()
    connection.reset()


async def _wrong_content_type(connection: Connection, reply: Reply) -> bool:
    await connection.send(Reply(reply.status, reply.body, {"Content-Type": "text/plain"}))
    return True


def dribble(interval: float = 0.05) -> Wire:
    """Send the head at once, then one byte of the body every `interval` seconds."""

    async def play(connection: Connection, reply: Reply) -> bool:
        await connection.write(reply.head())
        for position in range(len(reply.body)):
            if connection.gone.is_set():
                return False
            await connection.write(reply.body[position : position + 1])
            await asyncio.sleep(interval)
        return True

    return Wire("dribble", play)


reset_before_answer = Wire("reset_before_answer", _reset_before_answer, bills=False)
reset_mid_body = Wire("reset_mid_body", _reset_mid_body)
truncated_body = Wire("truncated_body", _truncated_body)
truncated_chunks = Wire("truncated_chunks", _truncated_chunks)
hang = Wire("hang", _hang, bills=False)
endless_body = Wire("endless_body", _endless_body)
close_after_answer = Wire("close_after_answer", _close_after_answer)
stale_keep_alive = Wire("stale_keep_alive", _close_after_answer, after=_reset_on_next_byte)
"""Answer in full, then reset as soon as the next request begins on that connection."""
wrong_content_type = Wire("wrong_content_type", _wrong_content_type)


# --- the vectors ---------------------------------------------------------------------------


def _per_row(name: str, change: Callable[[Row], None]) -> Payload:
    """Make a fault that changes the first row, or the rows of the text given to `on`."""

    def change_rows(rows: list[Row], text: str | None) -> list[Row]:
        for row in rows:
            if row.text == text or (text is None and row.index == 0):
                change(row)
        return rows

    return Payload(name, change_rows)


def _set_value(value: Any) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row.value = value

    return change


def _set_number(number: float, nonfinite: str = "literal") -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row.value = row.value.astype(np.float64)  # float32 could not hold 1e39
        row.value[len(row.value) // 2] = number
        row.nonfinite = nonfinite

    return change


def _zero(row: Row) -> None:
    row.value = np.zeros_like(row.value)


def _shorten(row: Row) -> None:
    row.value = row.value[:-1]


def _to_strings(row: Row) -> None:
    row.value = [str(number) for number in row.value]


def _shorten_all(rows: list[Row], text: str | None) -> list[Row]:
    for row in rows:
        _shorten(row)
    return rows


def _drop_last(rows: list[Row], text: str | None) -> list[Row]:
    return rows[:-1]


def _add_one(rows: list[Row], text: str | None) -> list[Row]:
    return [*rows, replace(rows[-1], index=len(rows))]


def _repeat_index(rows: list[Row], text: str | None) -> list[Row]:
    rows[-1].index = 0 if len(rows) > 1 else rows[-1].index
    return rows if len(rows) > 1 else [*rows, replace(rows[0])]


def _index_out_of_range(rows: list[Row], text: str | None) -> list[Row]:
    rows[-1].index = len(rows)
    return rows


def _set_index(value: int) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        row.index = value

    return change


one_vector_fewer = Payload("one_vector_fewer", _drop_last)
one_vector_more = Payload("one_vector_more", _add_one)
duplicate_index = Payload("duplicate_index", _repeat_index)
index_out_of_range = Payload("index_out_of_range", _index_out_of_range)
negative_index = _per_row("negative_index", _set_index(-1))
null_vector = _per_row("null_vector", _set_value(None))
empty_vector = _per_row("empty_vector", _set_value(np.zeros(0, dtype=np.float32)))
nan_literal = _per_row("nan_literal", _set_number(float("nan")))
nan_as_null = _per_row("nan_as_null", _set_number(float("nan"), "null"))
infinity_literal = _per_row("infinity_literal", _set_number(float("inf")))
overflows_float32 = _per_row("overflows_float32", _set_number(1e39))
zero_vector = _per_row("zero_vector", _zero)
wrong_dimension = Payload("wrong_dimension", _shorten_all)
mixed_dimensions = _per_row("mixed_dimensions", _shorten)
vector_of_strings = _per_row("vector_of_strings", _to_strings)

PAYLOAD_FAULTS: tuple[Payload, ...] = (
    one_vector_fewer,
    one_vector_more,
    duplicate_index,
    index_out_of_range,
    negative_index,
    null_vector,
    empty_vector,
    nan_literal,
    nan_as_null,
    infinity_literal,
    overflows_float32,
    zero_vector,
    wrong_dimension,
    mixed_dimensions,
    vector_of_strings,
)
"""Every way an answer can lie about its vectors, to parametrize tests over."""

BROKEN_TRANSFERS: tuple[Wire, ...] = (
    reset_before_answer,
    reset_mid_body,
    truncated_body,
    truncated_chunks,
)
"""Every way a transfer ends early, to parametrize tests over."""

BROKEN_BODIES: tuple[Fault, ...] = (
    html_page(200),
    html_page(502),
    invalid_json,
    empty_body,
    json_null,
)
"""Complete bodies that are not an answer."""
