"""The command line: `embedding-gateway serve` and `embedding-gateway check`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from app import __version__, logs
from app.config import Settings
from app.config.load import ConfigError, load
from app.config.source import ConfigSource, ParentConfig
from app.gateway import Gateway
from app.main import App, create_app, warn_if_open
from app.metrics import multiprocess
from app.pipeline.deployment import Deployment
from app.registry import PublicModel
from app.serve import CannotListen, listen, serve, serve_workers
from app.types import Batch, Embedding, Params
from app.upstreams import UPSTREAMS
from app.workers import ParentChannel, own_command

log = logging.getLogger("app")

_HELP = """\
One OpenAI-compatible /v1/embeddings in front of every embedding vendor.

Configuration is the first of --config, $EMBEDDING_GATEWAY_CONFIG (a file that is named must be there) and
./config.yaml. With no file, the environment decides. These variables switch their upstream on:

{variables}

and REDIS_URL the shared cache. With none of them a built-in model answers, so that there is always
something to try. SIGHUP, or a change of the file, loads it anew.
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
    """The program. Exits 0, or 2 with one readable line per mistake."""
    _fill_standard()
    options = _parser().parse_args(arguments)
    commands = {"serve": _serve, "check": _check, "worker": _work}
    try:
        commands[options.command](options)
    except ConfigError as error:
        _fail(error.mistakes)
    except CannotListen as error:
        _fail([str(error)])
    except KeyboardInterrupt:
        sys.exit(130)


def _fill_standard() -> None:
    """Nothing of ours is to have the number of a standard stream that was closed: workers have another in its place,
    and the event loop's library ends a process that closes one. In a jail without a /dev they stay as they are."""
    with contextlib.suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    variables = "\n".join(f"  {kind.switched_on_by}" for kind in UPSTREAMS.values() if kind.switched_on_by)
    described = _HELP.format(variables=variables)
    parser = argparse.ArgumentParser("embedding-gateway", description=described, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "serve until stopped"),
        ("check", "read the configuration and show what would be served, or every mistake in it"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--config", metavar="FILE", help="YAML configuration")
        if name == "serve":
            command.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1)")
            command.add_argument("--port", metavar="P", type=int, help="port to listen on (default 8080)")
            command.add_argument("--workers", metavar="N", type=int, help="processes (default 1)")
            _add_logging(command)
        else:
            command.add_argument(
                "--probe", action="store_true", help="embed one text on every deployment (costs a few tokens)"
            )
    # What `serve` starts where there are several; nobody else has a listener to give it, so it is not shown.
    command = commands.add_parser("worker")
    command.add_argument("--listener", type=int, required=True)
    command.add_argument("--orders", type=int, required=True)
    _add_logging(command)
    return parser


def _add_logging(command: argparse.ArgumentParser) -> None:
    levels = ("debug", "info", "warning", "error")
    command.add_argument("--log-format", choices=("text", "json"), default="text", help="default text")
    command.add_argument("--log-level", choices=levels, default="info", help="default info")


def _show(line: str) -> None:
    """A line of what was asked for. Where nobody takes it, the program ends; quietly, if they have seen enough."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter tries again at its end
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        _fail([f"cannot write: {error.strerror}"])


def _fail(lines: Sequence[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    sys.exit(2)


# --- serve ------------------------------------------------------------------------------------------

_FLAGS = ("host", "port", "workers")


def _serve(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until there is something to stop; that is no failure
    logs.configure(options.log_format, options.log_level)
    source = ConfigSource(options.config, os.environ, UPSTREAMS)
    settings = _load(source, options)
    server = settings.server
    listener = listen(server.host, server.port)
    admin = None if server.metrics_port is None else listen(server.host, server.metrics_port)
    _announce(settings, listener, admin)
    if source.file is None:
        _warn_of_unused(os.environ)
    if server.workers == 1:
        serve(_app(settings, options, source), listener, admin=admin)
        return
    listener.set_inheritable(True)

    def command(orders: int) -> list[str]:
        logging_as = ["--log-format", options.log_format, "--log-level", options.log_level]
        return own_command("worker", *logging_as, "--listener", str(listener.fileno()), "--orders", str(orders))

    try:
        temporary = tempfile.TemporaryDirectory(prefix="embedding-gateway-")
    except OSError as error:
        _fail([f"several workers need a temporary directory: {error.strerror}"])
    app = create_app(settings, stores=[])  # its own metrics are to be none of those that are shared
    with temporary as directory, _kept(directory), multiprocess(directory):
        sys.exit(serve_workers(app, command, listener, source=source, admin=admin))


@contextlib.contextmanager
def _kept(directory: str) -> Iterator[None]:
    """A lock on it tells systemd-tmpfiles that it is in use: else it goes when its files have lain there for ten days,
    and those that are mapped look as old as they were made (python/cpython#81831)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _work(options: argparse.Namespace) -> None:
    """One of several worker processes, which its parent has given a listener."""
    logs.configure(options.log_format, options.log_level)
    try:
        orders = ParentChannel(options.orders, UPSTREAMS)
    except EOFError:
        return
    app = _app(orders.given.load(), options, orders.given)
    serve(app, socket.socket(fileno=options.listener), orders=orders)


def _load(source: ConfigSource, options: argparse.Namespace) -> Settings:
    """The settings with the flags over them. The environment carries flags, so that a reload finds
    them too; a mistake in one is told by the flag's name."""
    told: dict[str, str] = {}
    for name in _FLAGS:
        value = getattr(options, name)
        if value is not None:
            variable = f"EMBEDDING_GATEWAY__SERVER__{name.upper()}"
            os.environ[variable] = str(value)
            told[f"{variable}: server.{name}: "] = f"--{name}: "
    try:
        return source.load()
    except ConfigError as error:
        mistakes = error.mistakes
        for variable, flag in told.items():
            mistakes = [each.replace(variable, flag, 1) for each in mistakes]
        raise ConfigError(mistakes) from None


def _app(settings: Settings, options: argparse.Namespace, source: ConfigSource | ParentConfig) -> App:
    severity = logging.getLevelNamesMapping()[options.log_level.upper()]
    return create_app(settings, request_log=logs.request_log(options.log_format, severity), source=source)


def _announce(settings: Settings, listener: socket.socket, admin: socket.socket | None) -> None:
    host = settings.server.host
    url = _url(host, listener)
    docs = f"docs at {'/docs' if admin is None else _url(host, admin) + '/docs'}"
    everywhere = ", listening on all addresses" if _is_unspecified(host) else ""
    log.info("embedding-gateway %s: base_url %s/v1, %s%s", __version__, url, docs, everywhere)
    log.info("upstreams: %s", ", ".join(f"{name} ({each.type})" for name, each in settings.upstreams.items()))
    warn_if_open(settings)


def _url(host: str, listener: socket.socket) -> str:
    """An address that can be used from this machine."""
    if _is_unspecified(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _warn_of_unused(environ: Mapping[str, str]) -> None:
    """Half of what switches an upstream on does nothing, and it is hard to see why."""
    present = {name: value for name, value in environ.items() if value}
    for name, kind in UPSTREAMS.items():
        found = [variable for variable in kind.variables if variable in present]
        if found and kind.environment(present) is None:
            log.warning("%s alone has no effect: %s is switched on by %s", found[0], name, kind.switched_on_by)


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


# --- check ------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    settings = load(options.config, os.environ, UPSTREAMS)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Nothing is cached and nothing shared is touched: a check leaves no trace.
    failed = asyncio.run(_report(create_app(settings, stores=[]).gateway, probe=options.probe))
    if failed:
        _fail(failed)


async def _report(gateway: Gateway, *, probe: bool) -> list[str]:
    """Prints the table of models; returns what is wrong with them, a line each."""
    await gateway.refresh()
    try:
        rows: list[tuple[str, ...]] = [
            ("MODEL", "DIMENSIONS", "INPUTS/CALL", "TOKENS/INPUT", "VECTOR SPACE", "DEPLOYMENTS")
        ]
        rows += [_row(name, public) for name, public in sorted(gateway.names.items()) if _listed(name, public)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            _show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        complete = not any(upstream.trouble for upstream in gateway.upstreams.values())
        registry = gateway.registry
        wrong = registry.unfit() + registry.apart() + (gateway.unserved() if complete else [])
        return wrong + (await _probe(gateway) if probe else [])
    finally:
        await gateway.aclose()


def _listed(name: str, public: PublicModel) -> bool:
    """`upstream/model` names only where there is no shorter one for the same thing."""
    return name == public.name or public.deployments[0].name != name


def _row(name: str, public: PublicModel) -> tuple[str, ...]:
    facts = public.facts
    shown = name if name == public.name else f"{name} (alias of {public.name})"
    return (
        shown,
        str(public.dimensions or "?"),
        str(facts.max_batch),
        str(facts.max_tokens_per_input or "?"),
        public.space,
        ", ".join(deployment.name for deployment in public.deployments),
    )


async def _probe(gateway: Gateway) -> list[str]:
    deployments = {each.name: each for public in gateway.names.values() for each in public.deployments}
    upstreams = gateway.upstreams.items()
    failed = [f"{name}: cannot list its models: {each.trouble}" for name, each in upstreams if each.trouble]
    used = {each.upstream for each in deployments.values()}
    failed += [
        f"{name}: it has no list of models at its base_url, and none is configured for it"
        for name, each in upstreams
        if not each.lists_models and name not in used
    ]
    for name, deployment in sorted(deployments.items()):
        trouble = await _try(deployment)
        _show(f"probe {name}: {trouble or 'ok'}")
        if trouble:
            failed.append(f"{name}: {trouble}")
    return failed


async def _try(deployment: Deployment) -> str | None:
    deadline = asyncio.get_running_loop().time() + 30
    batch = Batch("probe", ["probe"], [b"probe"], Params(), False, deadline)
    (outcome,) = (await deployment.embed(batch)).outcomes
    return None if isinstance(outcome, Embedding) else f"{outcome.code}: {outcome.message}"
