"""The targets to measure, limits and gateway, and how each is started. Peers are in `bench.peers`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import pool
from bench.procs import Cores, Process
from bench.scenarios import Scenario
from tests.processes import free_port

KEY = "bench-key-0123456789abcdef"


@dataclass(frozen=True)
class Setup:
    """What a target needs to know to start."""

    scenario: Scenario
    cache: str
    """none, memory or redis."""
    mock_port: int
    redis_port: int
    work: Path
    """A directory for its files."""
    cores: Cores

    @property
    def upstream(self) -> str:
        return _url(self.mock_port)


@dataclass
class Running:
    """A target that is ready for requests."""

    port: int
    process: Process | None = None
    path: str = "/v1/embeddings"
    headers: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = pool.MODELS

    def stop(self) -> None:
        if self.process:
            self.process.stop()


@dataclass(frozen=True)
class Target:
    """A name and how to start it. `start` raises `BenchError`."""

    name: str
    start: Callable[[Setup], Running]
    caches: tuple[str, ...] = ("none",)
    install: Callable[[], str] = lambda: ""
    """Installs the target if necessary, and returns its version."""


def _direct(setup: Setup) -> Running:
    return Running(setup.mock_port)


def _bare(setup: Setup) -> Running:
    port = free_port()
    scenario = setup.scenario
    command = [sys.executable, "-m", "bench.bare", str(port), str(scenario.texts), scenario.encoding]
    return started(Running(port, Process(command, setup.cores.target, setup.work / "bare.log")), "/", 20)


def _gateway(setup: Setup) -> Running:
    more = {}
    if setup.cache == "redis":
        more["cache"] = {"memory": None, "redis": {"url": f"redis://127.0.0.1:{setup.redis_port}/0"}}
    return gateway(setup.mock_port, setup.work, setup.cores.target, more)


def gateway(mock_port: int, work: Path, core: int | None, more: Mapping[str, object]) -> Running:
    """Starts the gateway with default settings, except for `more`: a key, metrics, memory cache, one worker, and a
    request log in a file. Raises `BenchError`."""
    upstream = {"type": "openai", "base_url": _url(mock_port), "api_key": "sk-bench"}
    config = {
        "auth": {"keys": {"bench": {"key": KEY}}},
        "upstreams": {"mock": upstream},
        "models": {
            name: {"dimensions": pool.DIMENSIONS, "deployments": [{"upstream": "mock", "model": name}]}
            for name in pool.MODELS
        },
        **more,
    }
    port = free_port()
    file = work / f"gateway-{port}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "app", "serve", "--config", str(file), "--port", str(port)]
    process = Process(command, core, work / f"gateway-{port}.log")
    return started(Running(port, process, headers=(("authorization", f"Bearer {KEY}"),)), "/healthz", 30)


def _url(mock_port: int) -> str:
    return f"http://127.0.0.1:{mock_port}/v1"


def started(running: Running, path: str, seconds: float) -> Running:
    """Returns `running` once it answers at `path`; stops it if it does not. Raises `BenchError`."""
    assert running.process is not None
    try:
        running.process.wait_for(running.port, path, seconds)
    except BaseException:
        running.stop()
        raise
    return running


DIRECT = Target("direct", _direct)
BARE = Target("bare ASGI", _bare)
GATEWAY = Target("gateway", _gateway, ("memory", "redis"))
