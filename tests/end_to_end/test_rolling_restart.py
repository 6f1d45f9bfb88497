"""Two gateways behind a TCP load balancer are restarted in turn under load, and no request is lost.

`LONG_TESTS=1` runs the long edition: ten restarts, ten thousand requests.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from tests.fakes import FakeOpenAI
from tests.processes import PATIENCE, free_port, start
from tests.tcp_balancer import Balancer, balancing

LONG = bool(os.environ.get("LONG_TESTS"))
RESTARTS, REQUESTS = (10, 10_000) if LONG else (2, 500)
CLIENTS = 8


class Load:
    """Clients that send one request after another, each over its own connection, and check every vector."""

    def __init__(self, url: str, fake: FakeOpenAI) -> None:
        self._url, self._fake = url, fake
        self._numbers = itertools.count()
        self.seen: Counter[str] = Counter()
        """Outcomes of the requests: "right", or what was wrong."""

    async def run(self, done: asyncio.Event) -> None:
        """Sends requests until `done` is set and there have been at least `REQUESTS`."""
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as client:
            while not done.is_set() or self.seen.total() < REQUESTS:
                texts = [f"text {next(self._numbers)}" for _ in range(2)]
                try:
                    answer = await client.post(f"{self._url}/v1/embeddings", json={"model": "tiny", "input": texts})
                    self.seen[self._verdict(answer, texts)] += 1
                except httpx.HTTPError as error:
                    self.seen[repr(error)] += 1

    def _verdict(self, answer: httpx.Response, texts: list[str]) -> str:
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        vectors = [np.array(item["embedding"], np.float32) for item in answer.json()["data"]]
        expected = [self._fake.expected("tiny", text) for text in texts]
        same = len(vectors) == 2 and all(map(np.array_equal, vectors, expected))
        return "right" if same else "a wrong vector"


async def until_ready(balancer: Balancer, count: int) -> None:
    async with asyncio.timeout(PATIENCE), balancer.changed:
        await balancer.changed.wait_for(lambda: len(balancer.ready) == count)


@pytest.mark.timeout(600)
async def test_no_request_is_lost_over_rolling_restarts(tmp_path: Path) -> None:
    with FakeOpenAI(models={"tiny": 16}, delay=0.02) as fake:
        values = {
            "server": {"drain": "1s"},
            "upstreams": {"fake": {"type": "openai", "base_url": fake.url + "/v1", "api_key": "sk-fake"}},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        ports = [free_port(), free_port()]

        def serve(port: int) -> subprocess.Popen[str]:
            env = {"EMBEDDING_GATEWAY__SERVER__DRAIN": "1s"}
            return start(tmp_path, "--port", str(port), "--log-level", "warning", log=f"log-{port}", **env)

        processes = {port: serve(port) for port in ports}
        clients: list[asyncio.Task[None]] = []
        try:
            async with balancing(ports) as (url, balancer):
                await until_ready(balancer, 2)
                load, done = Load(url, fake), asyncio.Event()
                clients += [asyncio.create_task(load.run(done)) for _ in range(CLIENTS)]
                for port in itertools.islice(itertools.cycle(ports), RESTARTS):
                    processes[port].terminate()
                    code = await asyncio.to_thread(processes[port].wait, PATIENCE)
                    assert code == 0, (tmp_path / f"log-{port}").read_text()
                    processes[port] = serve(port)
                    await until_ready(balancer, 2)
                done.set()
                await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                await asyncio.to_thread(process.wait, PATIENCE)
    assert load.seen == {"right": load.seen.total()}
    assert load.seen.total() >= REQUESTS
