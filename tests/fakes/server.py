"""A socket server in a thread of its own, so that both sync and async tests can use it.

Handles connections only; subclasses answer the requests.
"""

import asyncio
import socket
import threading
from abc import ABC, abstractmethod
from typing import Self

from .wire import Connection, Reader, Request, listen


class ThreadedServer(ABC):
    """A loopback HTTP server with its own event loop; ``with server:`` runs it."""

    def __init__(self) -> None:
        self.connections = 0
        """Connections accepted so far."""
        self.crashes: list[Exception] = []
        self._port = 0
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[Connection] = set()

    @abstractmethod
    async def exchange(self, connection: Connection, request: Request) -> bool:
        """Answer one request; return whether the connection may serve another."""

    def start(self) -> Self:
        """Listen; after `stop`, on the same port again."""
        sock = listen(self._port)
        self._port = sock.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()

        def run() -> None:
            self._loop.run_until_complete(self._main(sock))
            self._loop.close()

        self._thread = threading.Thread(target=run, name=type(self).__name__, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Drop all connections and stop listening: from now on connecting is refused."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.stop()
        if self.crashes and kind is None:
            raise self.crashes[0]  # a bug in the fake must not pass for an upstream fault

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://127.0.0.1:{self._port}"

    async def _main(self, sock: socket.socket) -> None:
        server = await self._loop.create_server(self._protocol, sock=sock)
        await self._stopping.wait()
        server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for connection in self._open:
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = Reader(self._loop)

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            connection = Connection(reader, writer, self.connections)
            task = self._loop.create_task(self._serve(connection))
            self._tasks.add(task)
            self._open.add(connection)
            task.add_done_callback(self._tasks.discard)

        return asyncio.StreamReaderProtocol(reader, accepted, loop=self._loop)

    async def _serve(self, connection: Connection) -> None:
        try:
            while (request := await connection.next_request()) is not None:
                if not await self.exchange(connection, request):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the peer left in the middle of a request or a reply
        except Exception as error:
            self.crashes.append(error)
            connection.reset()
        finally:
            self._open.discard(connection)
            await connection.close()
