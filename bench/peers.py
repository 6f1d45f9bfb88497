"""Peers: how each is installed in an environment of its own under bench/.peers, and started on one core."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import pool
from bench.procs import BenchError, Process
from bench.targets import KEY, Running, Setup, Target, started
from tests.processes import free_port

HOME = Path(__file__).parent / ".peers"
_INSTALL_TIMEOUT = 900.0
_START_TIMEOUT = 120.0

LITELLM = "1.106.2"
TENSORZERO = "2026.6.0"
MLFLOW = "3.17.2"
PORTKEY = "1.9.8"  # later ones answer 500 to embeddings of provider openai


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT)
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).strip().splitlines()
        raise BenchError(f"{' '.join(command[:4])} …: {output[-1] if output else error.returncode}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{' '.join(command[:4])} …: {error}") from None


def _from_pypi(name: str, version: str, *packages: str) -> str:
    """Creates a virtual environment with these packages, unless there is one. pip byte-compiles them."""
    home = HOME / name
    done = home / f".installed-{version}"
    if not done.exists():
        shutil.rmtree(home, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(home)])
        _run([str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--no-input", *packages])
        done.touch()
    return version


def _from_npm(name: str, version: str, package: str) -> str:
    home = HOME / name
    done = home / f".installed-{version}"
    if not done.exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        _run(["npm", "install", "--prefix", str(home), "--no-audit", "--no-fund", f"{package}@{version}"])
        done.touch()
    return version


# --- LiteLLM ----------------------------------------------------------------------------------------------


def _litellm(setup: Setup) -> Running:
    """The proxy with a master key and no database, one worker; its own cache where one is asked for."""
    config: dict[str, object] = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{name}", "api_base": setup.upstream, "api_key": "sk-bench"},
            }
            for name in pool.MODELS
        ],
        "general_settings": {"master_key": f"sk-{KEY}"},
    }
    if setup.cache == "memory":
        config["litellm_settings"] = {"cache": True, "cache_params": {"type": "local"}}
    elif setup.cache == "redis":
        redis = {"type": "redis", "host": "127.0.0.1", "port": setup.redis_port}
        config["litellm_settings"] = {"cache": True, "cache_params": redis}
    file = setup.work / "litellm.yaml"
    file.write_text(json.dumps(config))
    port = free_port()
    command = [str(HOME / "litellm/bin/litellm"), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", "1", "--telemetry", "False"]
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
    process = Process(command, setup.cores.target, setup.work / "litellm.log", env, setup.work)
    headers = (("authorization", f"Bearer sk-{KEY}"),)
    return started(Running(port, process, headers=headers), "/health/liveliness", _START_TIMEOUT)


# --- TensorZero -------------------------------------------------------------------------------------------

_TENSORZERO = """\
import sys, time
from tensorzero import _start_http_gateway
gateway = _start_http_gateway(
    config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=None, async_setup=False
)
open(sys.argv[2], "w").write(gateway.base_url)
while True:
    time.sleep(60)
"""


def _tensorzero(setup: Setup) -> Running:
    """The HTTP gateway in Rust that its Python package embeds; observability is off, as it needs a database."""
    names = [f"bench-{i}" for i in range(len(pool.MODELS))]
    lines = ["[gateway]", "observability.enabled = false"]
    for name, model in zip(names, pool.MODELS, strict=True):
        lines += [
            f"[embedding_models.{name}]",
            'routing = ["mock"]',
            f"[embedding_models.{name}.providers.mock]",
            'type = "openai"',
            f'model_name = "{model}"',
            f'api_base = "{setup.upstream}/"',
            'api_key_location = "none"',
        ]
    config, address = setup.work / "tensorzero.toml", setup.work / "tensorzero.url"
    config.write_text("\n".join(lines) + "\n")
    address.unlink(missing_ok=True)
    command = [str(HOME / "tensorzero/bin/python"), "-c", _TENSORZERO, str(config), str(address)]
    process = Process(command, setup.cores.target, setup.work / "tensorzero.log", cwd=setup.work)
    until = time.monotonic() + _START_TIMEOUT
    while not (address.exists() and address.read_text().rstrip("/")):
        if time.monotonic() > until or not process.alive:
            process.stop()
            raise BenchError(f"did not start: {process.last_words()}")
        time.sleep(0.05)
    port = int(address.read_text().split(":")[2].split("/")[0])
    models = tuple(f"tensorzero::embedding_model_name::{name}" for name in names)
    return started(Running(port, process, "/openai/v1/embeddings", models=models), "/health", _START_TIMEOUT)


# --- MLflow -----------------------------------------------------------------------------------------------


def _mlflow(setup: Setup) -> Running:
    config = {
        "endpoints": [
            {
                "name": name,
                "endpoint_type": "llm/v1/embeddings",
                "model": {
                    "provider": "openai",
                    "name": name,
                    "config": {"openai_api_key": "sk-bench", "openai_api_base": setup.upstream},
                },
            }
            for name in pool.MODELS
        ]
    }
    file = setup.work / "mlflow.yaml"
    file.write_text(json.dumps(config))
    port = free_port()
    program = HOME / "mlflow/bin"
    command = [str(program / "mlflow"), "gateway", "start", "--config-path", str(file), "--port", str(port)]
    env = {"PATH": f"{program}:/usr/bin:/bin", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    process = Process([*command, "--workers", "1"], setup.cores.target, setup.work / "mlflow.log", env, setup.work)
    return started(Running(port, process), "/health", _START_TIMEOUT)


# --- Portkey ----------------------------------------------------------------------------------------------


def _portkey(setup: Setup) -> Running:
    port = free_port()
    server = HOME / "portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
    command = ["node", str(server), f"--port={port}", "--headless"]
    env = {"NODE_ENV": "production"}
    process = Process(command, setup.cores.target, setup.work / "portkey.log", env, setup.work)
    headers = (
        ("authorization", "Bearer sk-bench"),
        ("x-portkey-provider", "openai"),
        ("x-portkey-custom-host", setup.upstream),
    )
    return started(Running(port, process, headers=headers), "/", _START_TIMEOUT)


PEERS: dict[str, Target] = {
    each.name: each
    for each in (
        Target(
            "litellm",
            _litellm,
            ("none", "memory", "redis"),
            # With opentelemetry, because otherwise LiteLLM tries to import it again on every request.
            lambda: _from_pypi("litellm", LITELLM, f"litellm[proxy]=={LITELLM}", "opentelemetry-sdk"),
        ),
        Target(
            "tensorzero",
            _tensorzero,
            install=lambda: _from_pypi("tensorzero", TENSORZERO, f"tensorzero=={TENSORZERO}"),
        ),
        Target("mlflow", _mlflow, install=lambda: _from_pypi("mlflow", MLFLOW, f"mlflow[gateway]=={MLFLOW}")),
        Target("portkey", _portkey, install=lambda: _from_npm("portkey", PORTKEY, "@portkey-ai/gateway")),
    )
}
