"""The command line: `embedding-gateway serve` and `embedding-gateway check`."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from app import __version__, logs
from app.config import Settings
from app.config.load import ConfigError, load
from app.errors import GatewayError
from app.gateway import Gateway, PublicModel
from app.main import App, create_app
from app.pipeline.deployment import Deployment
from app.serve import drain_on_sigterm, listen, serve, serve_workers
from app.types import Batch, Embedding, Params
from app.upstreams import UPSTREAMS

log = logging.getLogger("app")

_HELP = """\
One OpenAI-compatible /v1/embeddings in front of every embedding vendor.

Configuration is the first of --config, $EMBEDDING_GATEWAY_CONFIG and ./config.yaml that exists. With no
file, the environment decides: DASHSCOPE_API_KEY, BAIDU_API_KEY with BAIDU_SECRET_KEY, OPENAI_API_KEY
(OPENAI_BASE_URL) and OLLAMA_HOST switch their upstream on, REDIS_URL the shared cache. With none of them
the built-in model `lexical` answers, so that there is always something to try.
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
    options = _parser().parse_args(arguments)
    try:
        if options.command == "check":
            _check(options)
        else:
            _serve(options)
    except ConfigError as error:
        _fail(error.mistakes)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("embedding-gateway", description=_HELP, epilog=_EXAMPLES, formatter_class=raw)
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
            command.add_argument("--log-format", choices=("text", "json"), default="text", help="default text")
            command.add_argument(
                "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default info"
            )
        else:
            command.add_argument(
                "--probe", action="store_true", help="embed one text on every deployment (costs a few tokens)"
            )
    return parser


def _fail(lines: Sequence[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    sys.exit(2)


# --- serve ------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> None:
    flags = {name: getattr(options, name) for name in ("host", "port", "workers")}
    for name, value in flags.items():
        if value is not None:
            # The workers read the configuration again: flags reach them as what they stand for.
            os.environ[f"EMBEDDING_GATEWAY__SERVER__{name.upper()}"] = str(value)
    settings = load(options.config, os.environ, UPSTREAMS)
    if options.config:
        os.environ["EMBEDDING_GATEWAY_CONFIG"] = options.config
    os.environ["EMBEDDING_GATEWAY_LOG"] = f"{options.log_format} {options.log_level}"
    logs.configure(options.log_format, options.log_level)
    server = settings.server
    try:
        listener = listen(server.host, server.port)
    except OSError as error:
        _fail([f"cannot listen on {server.host}:{server.port}: {error.strerror}"])
    # A stop is no failure: uvicorn raises the signal again when all is done, and this is where it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _announce(settings, listener.getsockname()[1])
    if server.workers > 1:
        serve_workers("app.cli:worker", settings, listener)
    else:
        serve(_app(settings), settings, listener)


def worker() -> App:
    """The application of one of several worker processes, which know the command line by their environment."""
    form, level = os.environ["EMBEDDING_GATEWAY_LOG"].split()
    logs.configure("json" if form == "json" else "text", level)
    settings = load(None, os.environ, UPSTREAMS)
    app = _app(settings)
    app.on_started = lambda: drain_on_sigterm(app, settings.server.drain)
    return app


def _app(settings: Settings) -> App:
    form, level = os.environ["EMBEDDING_GATEWAY_LOG"].split()
    severity = logging.getLevelNamesMapping()[level.upper()]
    return create_app(settings, request_log=logs.request_log("json" if form == "json" else "text", severity))


def _announce(settings: Settings, port: int) -> None:
    server = settings.server
    host = f"[{server.host}]" if ":" in server.host else server.host
    log.info("embedding-gateway %s: base_url http://%s:%d/v1, docs at /docs", __version__, host, port)
    log.info("upstreams: %s", ", ".join(f"{name} ({each.type})" for name, each in settings.upstreams.items()))
    if settings.auth is None and not _is_loopback(server.host):
        log.warning("no auth.keys: anybody who reaches %s can embed at your expense", server.host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- check ------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    settings = load(options.config, os.environ, UPSTREAMS)
    # Nothing is cached and nothing shared is touched: a check leaves no trace.
    failed = asyncio.run(_report(create_app(settings, stores=[]).gateway, probe=options.probe))
    if failed:
        _fail(failed)


async def _report(gateway: Gateway, *, probe: bool) -> list[str]:
    """Prints the table of models; returns what a probe found wrong, a line each."""
    await gateway.refresh()
    try:
        rows: list[tuple[str, ...]] = [
            ("MODEL", "DIMENSIONS", "INPUTS/CALL", "TOKENS/INPUT", "VECTOR SPACE", "DEPLOYMENTS")
        ]
        rows += [_row(name, public) for name, public in sorted(gateway.names.items()) if _listed(name, public)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for name, upstream in gateway.upstreams.items():
            if upstream.trouble:
                print(f"upstream {name}: cannot list its models: {upstream.trouble}", file=sys.stderr)
        return await _probe(gateway) if probe else []
    finally:
        await gateway.aclose()


def _listed(name: str, public: PublicModel) -> bool:
    """`upstream/model` names only where there is no shorter one for the same thing."""
    return name == public.name or public.deployments[0].name != name


def _row(name: str, public: PublicModel) -> tuple[str, ...]:
    model = public.model
    shown = name if name == public.name else f"{name} (alias of {public.name})"
    return (
        shown,
        str(model.dimensions or "?"),
        str(model.max_batch),
        str(model.max_tokens_per_input or "?"),
        public.space,
        ", ".join(deployment.name for deployment in public.deployments),
    )


async def _probe(gateway: Gateway) -> list[str]:
    deployments = {each.name: each for public in gateway.names.values() for each in public.deployments}
    failed = []
    for name, deployment in sorted(deployments.items()):
        trouble = await _try(deployment)
        print(f"probe {name}: {trouble or 'ok'}")
        if trouble:
            failed.append(f"{name}: {trouble}")
    return failed


async def _try(deployment: Deployment) -> str | None:
    deadline = asyncio.get_running_loop().time() + 30
    batch = Batch("probe", ["probe"], [b"probe"], Params(), False, deadline)
    try:
        outcome = (await deployment.embed(batch)).outcomes[0]
    except GatewayError as error:
        outcome = error
    return None if isinstance(outcome, Embedding) else f"{outcome.code}: {outcome.message}"
