"""The base of all fake upstreams: records calls, plays faults, holds calls at a gate.

Vendors subclass it to say which requests are embedding calls and how to answer them.
"""

import asyncio
import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from .faults import Answer, Fault, Payload, VendorError, Wire
from .gate import Gate
from .server import ThreadedServer
from .vectors import Row, Text, shuffled
from .wire import Connection, Reply, Request


@dataclass(eq=False)
class Call(Request):
    """One embedding call, as received and as answered."""

    texts: list[Text] = field(default_factory=list)
    billed: int = 0
    """Tokens charged; 0 for a refused call."""
    status: int | None = None
    """Status answered; None while in progress, and when the fault sent none."""
    fault: str | None = None
    abandoned: bool = False
    """Whether the peer left before it was answered."""

    @property
    def rows(self) -> int:
        """How many inputs the call carried."""
        return len(self.texts)


@dataclass
class Embedded:
    """The vendor's answer to a valid call, before faults and shuffling."""

    rows: list[Row]
    tokens: int
    render: Callable[[list[Row]], Reply]


When = Callable[[list[Text]], bool]


@dataclass
class _Planned:
    fault: Fault
    remaining: int | None
    when: When | None
    path: str | None

    def matches(self, request: Request) -> bool:
        if self.path is not None:
            return self.path in request.path
        if not isinstance(request, Call):
            return False
        return self.when is None or self.when(request.texts)


class FakeUpstream(ThreadedServer):
    """A vendor's server on loopback; ``with FakeX() as fake:`` runs it.

    `delay`: seconds every embedding call takes. `shuffle`: answer rows out of order.
    `max_batch`: rows per call, instead of the vendor's limit. `concurrency_limit`: embedding
    calls beyond this many at once are refused with the vendor's rate limit error.
    """

    aliases: ClassVar[Mapping[str, str]] = {}
    """Error names that every fake understands -> the vendor's own: rate_limit, quota, auth,
    unavailable, internal, bad_input."""

    def __init__(
        self,
        *,
        delay: float = 0.0,
        shuffle: bool = True,
        max_batch: int | None = None,
        concurrency_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.delay = delay
        self.shuffle = shuffle
        self.max_batch = max_batch
        self.concurrency_limit = concurrency_limit
        self.in_flight = 0
        self._changed = threading.Condition()
        self._gate = Gate()
        self._forget()

    # --- for vendors to implement ---------------------------------------------------------

    @abstractmethod
    def is_embedding(self, request: Request) -> bool:
        """Return whether this request is counted, held and failed as an embedding call."""

    @abstractmethod
    def texts_of(self, request: Request) -> list[Text]:
        """Return the inputs, in order, or [] if the body cannot be read."""

    @abstractmethod
    def embed(self, call: Call) -> Embedded | Reply:
        """Check an embedding call as the vendor does, and answer or refuse it."""

    @abstractmethod
    def other(self, request: Request) -> Reply:
        """Answer everything else."""

    @abstractmethod
    def error_reply(self, request: Request, error: VendorError) -> Reply:
        """Print an error of the vendor's table in the shape of this route."""

    def refuse(self, request: Request, name: str | int, message: str | None = None) -> Reply:
        """Return the vendor's error of this name (or common alias)."""
        return self.error_reply(request, VendorError(str(name), message))

    def start(self) -> Self:
        self._gate = Gate()
        return super().start()

    # --- for tests to read ----------------------------------------------------------------

    @property
    def billed_tokens(self) -> int:
        """Tokens charged for all calls."""
        return sum(call.billed for call in self.calls)

    @property
    def rows(self) -> int:
        """How many inputs all charged calls carried."""
        return sum(call.rows for call in self.calls if call.billed)

    def reset(self) -> None:
        """Forget calls, counters and planned faults, and open the gate; configuration stays."""
        self.release()
        with self._changed:
            self._forget()

    def _forget(self) -> None:
        self.calls: list[Call] = []
        self.requests: list[Request] = []
        self.max_in_flight = self.in_flight
        self._planned: list[_Planned] = []

    # --- for tests to control -------------------------------------------------------------

    def hold(self) -> None:
        """Make embedding calls wait, once they are read, until they are released."""
        self._loop.call_soon_threadsafe(self._gate.hold)

    def release(self, count: int | None = None) -> None:
        """Let `count` calls pass, present or future, in order of arrival; None opens the gate."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._gate.release, count)

    def fail(
        self,
        fault: Fault,
        times: int | None = 1,
        *,
        when: When | None = None,
        path: str | None = None,
    ) -> None:
        """Play `fault` on the next `times` embedding calls (None: always), oldest plan first.

        `when` restricts it to calls whose texts satisfy it. `path` restricts it to requests,
        embedding or not, whose path contains it.
        """
        with self._changed:
            self._planned.append(_Planned(fault, times, when, path))

    def heal(self) -> None:
        """Drop the faults still planned."""
        with self._changed:
            self._planned.clear()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        """Block until `condition` holds; it is checked whenever a call arrives or ends."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                seen = f"{len(self.calls)} calls, {self.in_flight} in flight"
                raise TimeoutError(f"not within {timeout} s; seen so far: {seen}")

    def wait_for_calls(self, count: int, timeout: float = 5.0) -> None:
        """Block until `count` embedding calls have arrived since the last reset."""
        self.wait_until(lambda: len(self.calls) >= count, timeout)

    def wait_until_idle(self, timeout: float = 5.0) -> None:
        """Block until no embedding call is in progress."""
        self.wait_until(lambda: self.in_flight == 0, timeout)

    async def calls_arrived(self, count: int, timeout: float = 5.0) -> None:
        """Do what `wait_for_calls` does without blocking the test's event loop."""
        await asyncio.to_thread(self.wait_for_calls, count, timeout)

    async def idle(self, timeout: float = 5.0) -> None:
        """Do what `wait_until_idle` does without blocking the test's event loop."""
        await asyncio.to_thread(self.wait_until_idle, timeout)

    # --- serving, in the server's own event loop -------------------------------------------

    async def exchange(self, connection: Connection, request: Request) -> bool:
        if self.is_embedding(request):
            request = call = Call(**vars(request))
            call.texts = self.texts_of(call)
        fault = self._arrive(request)
        over_limit = self.concurrency_limit is not None and self.in_flight > self.concurrency_limit
        try:
            if isinstance(request, Call):
                await self._wait(connection)
                request.abandoned = connection.gone.is_set()
                if request.abandoned:
                    return False
            reply = self._reply(request, fault, over_limit)
            if isinstance(request, Call):
                request.status = reply.status
            if isinstance(fault, Wire):
                reusable = await self._play(fault, connection, request, reply)
        finally:
            self._leave(request)  # before a good reply is sent, so that the next call does not overlap
        if isinstance(fault, Wire):
            await fault.after(connection)
            return reusable
        close = request.headers.get("connection", "").lower() == "close"
        await connection.send(reply, close=close, head_only=request.method == "HEAD")
        return not close

    def _arrive(self, request: Request) -> Fault | None:
        with self._changed:
            self.requests.append(request)
            fault = self._take_fault(request)
            if isinstance(request, Call):
                request.fault = fault.name if fault else None
                self.calls.append(request)
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
            self._changed.notify_all()
        return fault

    def _leave(self, request: Request) -> None:
        with self._changed:
            if isinstance(request, Call):
                self.in_flight -= 1
            self._changed.notify_all()

    def _take_fault(self, request: Request) -> Fault | None:
        for plan in self._planned:
            if not plan.matches(request):
                continue
            if plan.remaining is not None:
                plan.remaining -= 1
                if plan.remaining == 0:
                    self._planned.remove(plan)
            return plan.fault
        return None

    async def _wait(self, connection: Connection) -> None:
        await self._gate.wait(connection)
        if self.delay:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.gone.wait(), self.delay)

    async def _play(self, fault: Wire, connection: Connection, request: Request, reply: Reply) -> bool:
        if isinstance(request, Call) and not fault.bills:
            request.billed, request.status = 0, None
        answered = connection.answered
        reusable = await fault.play(connection, reply)
        if isinstance(request, Call):
            unanswered = connection.answered == answered
            request.abandoned = connection.gone.is_set() and unanswered
        return reusable

    def _reply(self, request: Request, fault: Fault | None, over_limit: bool) -> Reply:
        if isinstance(fault, Answer):
            return fault.reply
        if isinstance(fault, VendorError):
            return self.error_reply(request, fault)
        if not isinstance(request, Call):
            return self.other(request)
        if over_limit:
            return self.refuse(request, "rate_limit")
        outcome = self.embed(request)
        if isinstance(outcome, Reply):
            return outcome
        request.billed = outcome.tokens
        rows = outcome.rows
        if isinstance(fault, Payload):
            rows = fault.change(rows, fault.text)
        if self.shuffle:
            rows = shuffled(rows, len(self.calls))
        return outcome.render(rows)
