"""The command line: `embedding-gateway serve` and `embedding-gateway check`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NoReturn

from app import __version__, logs
from app.check import check
from app.config import Settings
from app.config.load import ENVIRONMENT, ConfigError
from app.config.source import ConfigSource, ParentConfig
from app.main import App, create_app, warn_of_open
from app.metrics import multiprocess
from app.serve import CannotListen, bind, serve, serve_workers
from app.upstreams import UPSTREAMS
from app.workers import ParentChannel, own_command

log = logging.getLogger("app")

_HELP = """\
One OpenAI-compatible /v1/embeddings in front of every embedding vendor.

Configuration is the first of --config, $EMBEDDING_GATEWAY_CONFIG (a file that is named must exist) and
./config.yaml. With no file, the environment decides. These variables switch their upstream on:

{variables}

and REDIS_URL the shared cache. With none of them a built-in model answers, so that there is always
something to try. SIGHUP, or a change of the file, reloads it.
"""

_EXAMPLES = """\
examples:
  embedding-gateway serve
  embedding-gateway serve --config gateway.yaml --host 0.0.0.0 --workers 4
  embedding-gateway check --config gateway.yaml --probe
  curl http://127.0.0.1:8080/v1/embeddings -d '{"model": "lexical", "input": "hello"}'

Any value of the configuration can be set in the environment: EMBEDDING_GATEWAY__SERVER__PORT=9000
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program. Exits with 0, or with 2 and one readable line per mistake."""
    _open_standard_streams()
    options = _parser().parse_args(arguments)
    commands = {"serve": _serve, "check": _check, "worker": _worker}
    try:
        commands[options.command](options)
    except ConfigError as error:
        _fail(error.mistakes)
    except CannotListen as error:
        _fail([str(error)])
    except KeyboardInterrupt:
        sys.exit(130)


def _open_standard_streams() -> None:
    """Opens /dev/null for standard streams that are closed, so that nothing of ours gets their numbers: workers have
    another file in their place, and libuv ends a process that closes one. In a jail without a /dev they stay closed."""
    with contextlib.suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        sys.stderr = sys.stderr or os.fdopen(2, "w")  # the interpreter has taken note that it was closed


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    variables = "\n".join(f"  {kind.switched_on_by}" for kind in UPSTREAMS.values() if kind.switched_on_by)
    description = _HELP.format(variables=variables)
    parser = argparse.ArgumentParser(
        "embedding-gateway", description=description, epilog=_EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "serve until stopped"
    command = commands.add_parser("serve", help=text, description=f"{text.capitalize()}.")
    command.add_argument("--config", metavar="FILE", help="YAML configuration")
    command.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", metavar="P", type=int, help="port to listen on (default 8080)")
    command.add_argument("--workers", metavar="N", type=int, help="processes (default 1)")
    _add_logging(command)
    text = "read the configuration and show what would be served, or every mistake in it"
    command = commands.add_parser("check", help=text, description=f"{text.capitalize()}.")
    command.add_argument("--config", metavar="FILE", help="YAML configuration")
    command.add_argument("--probe", action="store_true", help="embed one text on every deployment (costs a few tokens)")
    # `serve` starts this for each of several workers. No one else has a listener to give it, so --help omits it.
    command = commands.add_parser("worker")
    command.add_argument("--listener", type=int, required=True)
    command.add_argument("--orders", type=int, required=True)
    _add_logging(command)
    return parser


def _add_logging(command: argparse.ArgumentParser) -> None:
    levels = ("debug", "info", "warning", "error")
    command.add_argument("--log-format", choices=("text", "json"), default="text", help="default text")
    command.add_argument("--log-level", choices=levels, default="info", help="default info")


def _print_line(line: str) -> None:
    """Prints a line of output, escaping what does not print: names come from upstreams. If that fails the program ends:
    quietly if the reader has closed the pipe."""
    try:
        print(logs.printable(line), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again on exit
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        _fail([f"cannot write: {error.strerror}"])


def _fail(lines: Sequence[str]) -> NoReturn:
    for line in lines:
        print(logs.printable(line), file=sys.stderr)
    sys.exit(2)


# --- serve ------------------------------------------------------------------------------------------

_FLAGS = {name: f"EMBEDDING_GATEWAY__SERVER__{name.upper()}" for name in ("host", "port", "workers")}
"""Flags, each with the variable in whose place its value is read, so that a reload applies it too."""


def _serve(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until there is something to stop, it is no failure
    logs.configure(options.log_format, options.log_level)
    flags = {variable: str(value) for name, variable in _FLAGS.items() if (value := getattr(options, name)) is not None}
    source = ConfigSource(options.config, os.environ | flags, UPSTREAMS)
    settings = _load(source, flags)
    server = settings.server
    listener = bind(server.host, server.port)
    admin = None if server.metrics_port is None else bind(server.host, server.metrics_port)
    announce = _announce(settings, listener, admin)
    if source.file is None:
        _warn_of_unused(os.environ)
    if server.workers == 1:
        serve(_app(settings, options, source), listener, announce, admin=admin)
        return
    listener.set_inheritable(True)

    def command(descriptor: int) -> list[str]:
        logging_as = ["--log-format", options.log_format, "--log-level", options.log_level]
        return own_command("worker", *logging_as, "--listener", str(listener.fileno()), "--orders", str(descriptor))

    try:
        temporary = tempfile.TemporaryDirectory(prefix="embedding-gateway-")
    except OSError as error:
        _fail([f"several workers need a temporary directory: {error.strerror}"])
    # It answers no requests, so it needs no cache. Not under `multiprocess`: its own metrics are not shared.
    app = create_app(settings, stores=[])
    with temporary as directory, _locked(directory), multiprocess(directory):
        sys.exit(serve_workers(app, command, listener, announce, source=source, admin=admin))


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Locks the directory, which tells systemd-tmpfiles that it is in use: otherwise it is removed when its files are
    ten days old, and mapped files keep their time of creation (python/cpython#81831)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _worker(options: argparse.Namespace) -> None:
    """Runs one of several worker processes, on the listener passed on by its parent."""
    logs.configure(options.log_format, options.log_level)
    try:
        parent = ParentChannel(options.orders, UPSTREAMS)
    except EOFError:
        return
    app = _app(parent.config.load(), options, parent.config)
    serve(app, socket.socket(fileno=options.listener), parent=parent)


def _load(source: ConfigSource, flags: Mapping[str, str]) -> Settings:
    """Loads the settings. A mistake in one of the flags, here by variable, is reported under the flag's name."""
    try:
        return source.load()
    except ConfigError as error:
        mistakes = error.mistakes
        for name, variable in _FLAGS.items():
            if variable in flags:
                mistakes = [each.replace(f"{variable}: server.{name}: ", f"--{name}: ", 1) for each in mistakes]
        raise ConfigError(mistakes) from None


def _app(settings: Settings, options: argparse.Namespace, source: ConfigSource | ParentConfig) -> App:
    severity = logging.getLevelNamesMapping()[options.log_level.upper()]
    return create_app(settings, request_log=logs.request_log(options.log_format, severity), source=source)


def _announce(settings: Settings, listener: socket.socket, admin: socket.socket | None) -> Callable[[], None]:
    """Logs what is about to be served. Returns what logs where, for when it is: whoever waits for that line calls
    there."""
    host, address = settings.server.host, _address(listener)
    url = _url(host, listener)
    docs = f"docs at {'/docs' if admin is None else _url(host, admin) + '/docs'}"
    everywhere = ""
    if address.is_unspecified:
        everywhere = ", listening on all addresses" + (" of IPv4" if address.version == 4 else "")
    log.info("upstreams: %s", ", ".join(f"{name} ({each.type})" for name, each in settings.upstreams.items()))
    if settings.auth is None and not address.is_loopback:
        warn_of_open(settings)
    return partial(log.info, "embedding-gateway %s: base_url %s/v1, %s%s", __version__, url, docs, everywhere)


def _url(host: str, listener: socket.socket) -> str:
    """A URL that works from this machine."""
    address = _address(listener)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _address(listener: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """What its host, which may be a name, stands for."""
    return ipaddress.ip_address(listener.getsockname()[0])


def _warn_of_unused(environ: Mapping[str, str]) -> None:
    """Warns if only some of an upstream's variables are set: it stays off, and it is hard to see why."""
    present = {name: value for name, value in environ.items() if value}
    for name, kind in UPSTREAMS.items():
        found = [variable for variable in kind.variables if variable in present]
        if found and kind.environment(present) is None:
            log.warning("%s alone has no effect: %s is switched on by %s", found[0], name, kind.switched_on_by)


# --- check ------------------------------------------------------------------------------------------


class _Printable(logging.Formatter):
    """The message alone."""

    def format(self, record: logging.LogRecord) -> str:
        return logs.printable(super().format(record))


def _check(options: argparse.Namespace) -> None:
    source = ConfigSource(options.config, os.environ, UPSTREAMS)
    settings = source.load()
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    failed = check(settings, source.file or ENVIRONMENT, _print_line, probe=options.probe)
    if failed:
        _fail(failed)
