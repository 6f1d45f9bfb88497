"""Mixed traffic over two upstreams; then every metric is compared with what the upstreams saw."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app import errors
from app.cache.counts import Counts
from app.cache.redis import RedisStore
from app.clock import SystemClock
from app.metrics import Metrics
from app.types import Source
from tests.api.support import MODEL, OTHER_MODEL, config, log_lines, post, settled, wire
from tests.fakes import FakeOpenAI, FakeUpstream, count_tokens, faults
from tests.harness import Running, running

PREFIX = "embedding_gateway_"
HOSTED = "BAAI/bge-m3"
PRICES = {MODEL: 0.02, OTHER_MODEL: 0.13, "priced": 7.0}
"""Per million tokens: two from the catalogue, one from the configuration."""
SENT_AS = {MODEL: MODEL, OTHER_MODEL: OTHER_MODEL, "priced": HOSTED}
"""Public model -> its upstream's name for it."""
KEYS = {name: {"key": f"key-of-{name}-0123456789"} for name in ("team", "ingest")}


class Exposition:
    """/metrics as parsed by Prometheus."""

    def __init__(self, gateway: Running) -> None:
        text = gateway.get("/metrics").text
        self.samples = [
            (sample.name.removeprefix(PREFIX), sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_created")
        ]

    def total(self, name: str, **labels: str) -> float:
        return sum(value for own, have, value in self.samples if own == name and labels.items() <= have.items())

    def by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """The metric summed over all labels but these; zeros are left out."""
        counted: Counter[tuple[str, ...]] = Counter()
        for own, have, value in self.samples:
            if own == name:
                counted[tuple(have[label] for label in labels)] += value  # type: ignore[assignment]
        return +counted

    def series(self) -> set[tuple[str, ...]]:
        return {(name, *sorted(f"{k}={v}" for k, v in labels.items())) for name, labels, _ in self.samples}


@dataclass
class Traffic:
    """Sends requests, and records what each must add to the metrics."""

    gateway: Running
    requests: Counter[tuple[str, ...]] = field(default_factory=Counter)
    cached: int = 0
    cached_tokens: Counter[str] = field(default_factory=Counter)
    answered: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def ask(
        self,
        model: str,
        texts: list[str],
        status: int = 200,
        client: str = "team",
        label: str | None = None,
        **headers: str,
    ) -> httpx.Response:
        """`label`: the model that the request counts for, if it is not `model`."""
        headers = {"api_key": f"key-of-{client}-0123456789", **headers}
        response = self.gateway.post({"model": model, "input": texts}, **headers)
        assert response.status_code == status, response.text
        self.requests[label or model, str(status), client] += 1
        if status == 200:
            cached = int(response.headers["x-embedding-cached-inputs"])
            self.cached += cached
            self.answered[label or model, "cache"] += cached
        return response


@dataclass
class Scene:
    hosted: FakeOpenAI
    openai: FakeOpenAI
    gateway: Running
    traffic: Traffic

    @property
    def fakes(self) -> dict[str, FakeUpstream]:
        return {"openai": self.openai, "hosted": self.hosted}


@contextmanager
def scene() -> Iterator[Scene]:
    with (
        FakeOpenAI() as openai,
        FakeOpenAI(api_key="sk-hosted", models={HOSTED: 16, OTHER_MODEL: 3072}) as hosted,
        running(
            config(openai, cache={}, auth={"keys": KEYS})
            | {
                "upstreams": {
                    "openai": {
                        "type": "openai",
                        "api_key": "sk-fake",
                        "base_url": f"{openai.url}/v1",
                        "max_concurrency": 2,
                    },
                    "hosted": {
                        "type": "openai",
                        "api_key": "sk-hosted",
                        "base_url": f"{hosted.url}/v1",
                        "max_concurrency": 1,
                    },
                },
                "models": {
                    "priced": {
                        "aliases": ["priced-alias"],
                        "deployments": [{"upstream": "hosted", "model": HOSTED}],
                        "max_batch": 2,
                        "price_per_million_tokens": PRICES["priced"],
                    }
                },
            }
        ) as gateway,
    ):
        yield Scene(hosted, openai, gateway, Traffic(gateway))


def drive(scene: Scene) -> None:
    """Sends every kind of traffic, one after the other."""
    traffic, openai, hosted = scene.traffic, scene.openai, scene.hosted
    words = ["one text", "another text of some more words", "文本向量"]

    traffic.ask(MODEL, words)
    traffic.ask(MODEL, words)  # all from the cache
    traffic.ask(f"openai/{MODEL}", [*words, "something new"], client="ingest", label=MODEL)  # a partial hit
    traffic.ask(MODEL, ["twin", "twin", "twin"])
    traffic.ask("priced", [f"priced text number {i}" for i in range(5)], client="ingest")  # three calls
    traffic.ask("priced-alias", ["priced text number 0"], label="priced")
    traffic.ask(MODEL, words, cache_control="no-cache, no-store")

    openai.fail(faults.vendor_error("auth"))
    traffic.ask(MODEL, ["meets a refused key"], 502)
    openai.fail(faults.vendor_error("bad_input"))
    traffic.ask(MODEL, ["is refused by the upstream"], 400)
    openai.fail(faults.vendor_error("internal"))
    traffic.ask(MODEL, ["is asked twice"])
    hosted.fail(faults.vendor_error("rate_limit", headers={"retry-after-ms": "1"}), times=2)
    traffic.ask("priced", ["is asked twice in vain"], 429)
    for deployment in scene.gateway.app.gateway.names[OTHER_MODEL].deployments:
        deployment.standing.unverified = False  # as if they had been compared, which would take more calls
    for fake in (openai, hosted):  # whichever is called first, the other is next
        fake.fail(faults.vendor_error("internal"), when=lambda texts: texts == ["moves over"])
    traffic.ask(OTHER_MODEL, ["moves over"], 502)
    openai.fail(faults.null_vector)
    traffic.ask(MODEL, ["gets a vector that is none at first"])

    traffic.ask(MODEL, [""], 400)
    traffic.ask("no such model", ["x"], 404, label="other")
    share(scene)
    hang_up(scene)


def share(scene: Scene) -> None:
    """Two callers want the same text at once, and one call serves both."""
    openai, traffic = scene.openai, scene.traffic
    before = len(openai.calls)
    openai.hold()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(traffic.ask, MODEL, ["shared by two callers"])
        openai.wait_for_calls(before + 1)
        # The second caller's own text has been sent, so it is already waiting for the shared one.
        second = pool.submit(traffic.ask, MODEL, ["shared by two callers", "its own"], client="ingest")
        openai.wait_for_calls(before + 2)
        openai.release()
        assert first.result().json()["data"][0] == second.result().json()["data"][0]


def hang_up(scene: Scene) -> None:
    openai, gateway = scene.openai, scene.gateway
    before = len(openai.calls)
    openai.hold()
    with wire(gateway.url) as connection:
        connection.send(post({"model": MODEL, "input": "nobody waits"}, "api-key: key-of-ingest-0123456789"))
        openai.wait_for_calls(before + 1)
    settled(gateway, lambda: any(line["status"] == "499" for line in log_lines(gateway)))
    scene.traffic.requests[MODEL, "499", "ingest"] += 1
    openai.release()
    openai.wait_until_idle()
    stored = gateway.metric("cache_operations_total", operation="set", result="ok")
    settled(gateway, lambda: gateway.metric("cache_operations_total", operation="set", result="ok") > stored - 1)


@pytest.fixture(scope="module")
def done() -> Iterator[Scene]:
    with scene() as played:
        drive(played)
        settled(played.gateway, lambda: outcome_count(played) == sum(len(f.calls) for f in played.fakes.values()))
        yield played


def outcome_count(scene: Scene) -> float:
    return scene.gateway.metric("upstream_requests_total")


@pytest.fixture
def exposed(done: Scene) -> Exposition:
    return Exposition(done.gateway)


def test_requests_are_counted_by_model_status_and_client(done: Scene, exposed: Exposition) -> None:
    assert exposed.by("requests_total", "model", "status", "client") == done.traffic.requests


def test_every_request_has_a_duration(done: Scene, exposed: Exposition) -> None:
    by_model: Counter[tuple[str, ...]] = Counter()
    for (model, *_), count in done.traffic.requests.items():
        by_model[(model,)] += count
    assert exposed.by("request_duration_seconds_count", "model") == by_model
    assert exposed.by("request_duration_seconds_bucket", "model", "le") >= Counter(
        {(model, "+Inf"): count for (model,), count in by_model.items()}
    )


def test_every_request_has_a_log_line_that_agrees(done: Scene) -> None:
    logged = Counter((line["model"], line["status"], line["client"]) for line in log_lines(done.gateway))
    assert logged == done.traffic.requests


def test_inputs_are_counted_by_where_their_vectors_came_from(exposed: Exposition) -> None:
    assert exposed.by("inputs_total", "model", "source") == {
        (MODEL, "upstream"): 3 + 1 + 1 + 3 + 1 + 1 + 2,  # first, new, twin, no-cache, retried, mended, shared and own
        (MODEL, "cache"): 3 + 3,
        (MODEL, "inflight"): 2 + 1,  # the other two twins, and the shared text
        ("priced", "upstream"): 5,
        ("priced", "cache"): 1,
    }


def test_cached_inputs_agree_with_what_the_responses_said(done: Scene, exposed: Exposition) -> None:
    assert exposed.total("inputs_total", source="cache") == done.traffic.cached
    assert +done.traffic.answered == +Counter(
        {key: count for key, count in exposed.by("inputs_total", "model", "source").items() if key[1] == "cache"}
    )


def test_billed_tokens_are_the_upstreams_own_bill(done: Scene, exposed: Exposition) -> None:
    billed: Counter[tuple[str, ...]] = Counter()
    for upstream, fake in done.fakes.items():
        for model, sent_as in SENT_AS.items():
            # An unusable answer is billed as well: see the last test.
            answered = (call for call in of(fake, sent_as) if call.fault in (None, faults.null_vector.name))
            billed[model, upstream] += sum(call.billed for call in answered)
    counted = Counter(
        {
            (labels["model"], labels["upstream"]): value
            for name, labels, value in exposed.samples
            if name == "tokens_total" and labels["source"] == "billed"
        }
    )
    assert counted == +billed


def test_cost_is_the_bill_times_the_price(done: Scene, exposed: Exposition) -> None:
    for model, price in PRICES.items():
        billed = exposed.total("tokens_total", model=model, source="billed")
        assert exposed.total("cost_total", model=model, currency="USD") == pytest.approx(billed * price / 1e6)
    assert exposed.total("cost_total") == pytest.approx(
        sum(exposed.total("cost_total", model=model) for model in PRICES)
    )


def test_spared_tokens_are_counted_apart(exposed: Exposition) -> None:
    words = sum(map(count_tokens, ["one text", "another text of some more words", "文本向量"]))
    shared = 2 * count_tokens("twin") + count_tokens("shared by two callers")
    assert exposed.total("tokens_total", model=MODEL, source="cached") == 2 * words
    assert exposed.total("tokens_total", model=MODEL, source="deduplicated") == shared
    assert {key[0] for key in exposed.by("tokens_total", "source")} == {"billed", "cached", "deduplicated"}


def test_upstream_calls_are_counted_by_what_became_of_them(done: Scene, exposed: Exposition) -> None:
    assert exposed.by("upstream_requests_total", "upstream", "model", "outcome") == {
        ("openai", MODEL, "ok"): sum(call.fault is None for call in of(done.openai, MODEL)),
        ("openai", MODEL, "upstream_auth"): 1,
        ("openai", MODEL, "invalid_value"): 1,
        ("openai", MODEL, "upstream_error"): 1,
        ("openai", MODEL, "upstream_invalid_response"): 1,
        ("hosted", HOSTED, "ok"): 3,
        ("hosted", HOSTED, "rate_limit_exceeded"): 2,
        ("openai", OTHER_MODEL, "upstream_error"): 1,
        ("hosted", OTHER_MODEL, "upstream_error"): 1,
    }


def of(fake: FakeUpstream, model: str) -> list[Any]:
    return [call for call in fake.calls if call.json["model"] == model]


@pytest.mark.parametrize("metric", ["upstream_requests_total", "upstream_request_duration_seconds_count"])
def test_every_call_is_counted_once_and_timed_once(metric: str, done: Scene, exposed: Exposition) -> None:
    seen: Counter[tuple[str, ...]] = Counter()
    for upstream, fake in done.fakes.items():
        seen.update((upstream, call.json["model"]) for call in fake.calls)
    assert exposed.by(metric, "upstream", "model") == seen


def test_batches_are_as_full_as_the_upstream_saw_them(done: Scene, exposed: Exposition) -> None:
    for upstream, fake in done.fakes.items():
        for model in SENT_AS.values():
            calls = of(fake, model)
            labels = {"upstream": upstream, "model": model}
            assert exposed.total("upstream_batch_inputs_sum", **labels) == sum(call.rows for call in calls)
            assert exposed.total("upstream_batch_inputs_count", **labels) == len(calls)
            alone = sum(call.rows == 1 for call in calls)
            assert exposed.total("upstream_batch_inputs_bucket", le="1.0", **labels) == alone


def test_retries_are_counted_by_their_reason(done: Scene, exposed: Exposition) -> None:
    retries = exposed.by("upstream_retries_total", "upstream", "reason")
    assert retries["openai", "upstream_invalid_response"] == 1
    assert retries["hosted", "rate_limit_exceeded"] == 1
    assert exposed.total("upstream_retries_total", reason="upstream_error") == 2
    assert sum(retries.values()) == 4


def test_nothing_waits_and_nobody_is_inside_when_all_is_done(exposed: Exposition) -> None:
    assert exposed.total("inflight_requests") == 0
    assert not exposed.by("queued_inputs", "upstream", "lane")
    lanes = {(labels["upstream"], labels["lane"]) for name, labels, _ in exposed.samples if name == "queued_inputs"}
    assert lanes == {(upstream, lane) for upstream in ("openai", "hosted") for lane in ("query", "bulk")}


def test_cache_operations_are_counted_by_value(done: Scene, exposed: Exposition) -> None:
    operations = exposed.by("cache_operations_total", "tier", "operation", "result")
    looked_up = 3 + 3 + 4 + 3 + 5 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 2 + 1  # in the order of `drive`
    assert operations["memory", "get", "hit"] == done.traffic.cached
    assert operations["memory", "get", "miss"] == looked_up - done.traffic.cached
    stored = 3 + 1 + 1 + 5 + 1 + 1 + 2 + 1  # each vector once, except under no-store
    assert operations["memory", "set", "ok"] == stored
    assert set(operations) == {("memory", "get", "hit"), ("memory", "get", "miss"), ("memory", "set", "ok")}
    assert exposed.total("cache_bytes", tier="memory") > stored * 16 * 4


def test_refused_requests_are_counted_by_reason(exposed: Exposition) -> None:
    assert exposed.by("rejected_requests_total", "reason") == {
        ("invalid_value",): 2, ("model_not_found",): 1, ("client_gone",): 1,
    }  # fmt: skip


def test_wrong_paths_methods_and_keys_are_counted_on_every_route() -> None:
    with FakeOpenAI() as fake, running(config(fake, auth={"keys": KEYS})) as gateway:
        embedded = {"model": MODEL, "input": "x"}
        for path in ("/v1/v1/embeddings", "/api/embeddings", "/v1/embedding"):
            assert httpx.post(gateway.url + path, json=embedded).status_code == 404
        assert gateway.get("/v1/models").status_code == 401
        assert gateway.get(f"/v1/models/{MODEL}").status_code == 401
        assert httpx.post(gateway.url + "/healthz").status_code == 405
        assert gateway.get("/v1/models/no-such", api_key=KEYS["team"]["key"]).status_code == 404
        exposed = Exposition(gateway)
        assert exposed.by("rejected_requests_total", "reason") == {
            ("not_found",): 3, ("invalid_api_key",): 2, ("method_not_allowed",): 1,
        }  # fmt: skip
        assert exposed.total("requests_total") == 0, "it counts embedding requests"


def test_deployments_are_shown_available(exposed: Exposition) -> None:
    available = exposed.by("upstream_available", "upstream", "model")
    assert {key for key in available if key[1] in (MODEL, OTHER_MODEL, HOSTED)} == {
        ("openai", MODEL), ("openai", OTHER_MODEL), ("hosted", OTHER_MODEL), ("hosted", HOSTED),
    }  # fmt: skip
    assert set(available.values()) == {1}


# --- labels ---------------------------------------------------------------------------------------------------------


def test_a_hundred_unknown_names_add_no_series() -> None:
    names = [f"gpt-{i}" for i in range(100)] + ["other", "x" * 5000, "a\nb", "模型", MODEL + " "]
    with FakeOpenAI() as fake, running(config(fake)) as gateway, httpx.Client(base_url=gateway.url) as client:

        def ask_for(name: str) -> None:
            body = {"model": name, "input": "x", "user": name}
            path = f"/v1/engines/{quote(name, safe='')}/embeddings"
            headers = {"api-key": quote(name)[:100], "x-request-id": quote(name)[:100]}
            for response in (
                client.post("/v1/embeddings", json=body, headers=headers),
                client.post(path, json=body, headers=headers),
                client.get(f"/v1/models/{quote(name, safe='')}", headers=headers),
            ):
                assert response.status_code == 404

        ask_for(names[0])
        before = Exposition(gateway)
        for name in names:
            ask_for(name)
        after = Exposition(gateway)
        assert after.series() == before.series()
        counted = after.total("requests_total", model="other", status="404", client="anonymous")
        # No route with a model in its path matches a line end.
        assert counted == after.total("requests_total") == 2 * (len(names) + 1) - 1
        assert after.total("rejected_requests_total", reason="model_not_found") == counted


def test_clients_count_by_name_and_never_by_key(done: Scene) -> None:
    text = done.gateway.get("/metrics").text
    assert "key-of-" not in text
    assert "sk-" not in text


CODES = {cls.code for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.GatewayError)}


def _cache_labels() -> dict[str, set[str]]:
    metrics = Metrics()
    for tier in ("memory", "disk", "redis"):
        Counts(metrics, tier)
    RedisStore("redis://127.0.0.1:9", 1.0, 1.0, SystemClock(), metrics)  # has more of them
    families = [each for each in metrics.registry.collect() if each.name == "embedding_gateway_cache_operations"]
    labels = [sample.labels for family in families for sample in family.samples]
    return {name: {each[name] for each in labels} for name in ("tier", "operation", "result")}


KNOWN: dict[str, set[str]] = {
    "outcome": {"ok"} | CODES,
    "reason": {"client_gone", "invalid_unicode", "invalid_http"} | CODES,
    "source": {*Source, "billed", "cached", "deduplicated"},
    "lane": {"query", "bulk"},
    **_cache_labels(),
}
DEPLOY = Path(__file__).parents[2] / "deploy"


def _expressions() -> list[str]:
    """Every PromQL expression we ship."""
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.extend(value for key, value in node.items() if key in ("expr", "query") and isinstance(value, str))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    for dashboard in (DEPLOY / "grafana/dashboards").glob("*.json"):
        walk(json.loads(dashboard.read_text()))
    return found


def _selectors() -> list[tuple[str, str, str]]:
    """(metric, label, value) of every matcher on a metric of ours; a pattern's alternatives are separate."""
    found: list[tuple[str, str, str]] = []
    for expression in _expressions():
        for metric, matchers in re.findall(rf"{PREFIX}(\w+)(?:\{{([^}}]*)\}})?", expression):
            for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
                values = value.split("|") if "~" in operator else [value]
                found.extend((metric, label, each) for each in values)
    return found


def test_alerts_and_dashboards_ask_for_labels_and_values_that_the_code_writes() -> None:
    metrics = Metrics()
    labels: dict[str, set[str]] = {}
    for family in metrics.registry._collector_to_names:  # there is no public attribute
        names = set(getattr(family, "_labelnames", ()))
        name = getattr(family, "_name", "").removeprefix(PREFIX)
        for suffix in ("", "_total", "_sum", "_count", "_bucket"):
            labels[name + suffix] = names | ({"le"} if suffix == "_bucket" else set())
    selectors = _selectors()
    assert {"outcome", "reason", "result", "operation"} <= {label for _, label, _ in selectors}
    for metric, label, value in selectors:
        assert metric in labels
        assert label in labels[metric] | {"job", "instance"}, (metric, label)
        if label in KNOWN:
            assert value in KNOWN[label], (metric, label, value)


def test_every_value_of_a_bounded_label_is_a_known_one(exposed: Exposition) -> None:
    for name, labels, _ in exposed.samples:
        for label, value in labels.items():
            if label in KNOWN:
                assert value in KNOWN[label], (name, label, value)


# --- calls that end badly ------------------------------------------------------------------------------------------


def test_a_call_cut_off_by_the_requests_deadline_is_counted_as_timed_out() -> None:
    with FakeOpenAI() as fake, running(config(fake, server={"request_timeout": "300ms"})) as gateway:
        fake.fail(faults.hang)
        assert gateway.post({"model": MODEL, "input": "never answered"}).status_code == 504
        settled(gateway, lambda: gateway.metric("upstream_request_duration_seconds_count") == 1)
        assert gateway.metric("upstream_requests_total", outcome="upstream_timeout") == 1


@pytest.mark.parametrize("none", ["first", "last"])
def test_a_call_that_brings_some_vectors_is_counted_as_one_that_succeeded(none: str) -> None:
    with FakeOpenAI() as fake, running(config(fake)) as gateway:
        fake.fail(faults.zero_vector.on(none))
        assert gateway.post({"model": MODEL, "input": ["first", "last"]}).status_code == 200
        assert [call.rows for call in fake.calls] == [2, 1], "asked again for the one that was none"
        assert gateway.metric("upstream_requests_total", outcome="ok") == gateway.metric("upstream_requests_total") == 2


def test_a_reply_that_is_no_answer_is_billed_all_the_same() -> None:
    with FakeOpenAI() as fake, running(config(fake)) as gateway:
        fake.fail(faults.one_vector_more, times=None)
        assert gateway.post({"model": MODEL, "input": ["paid for", "in vain"]}).status_code == 502
        assert fake.billed_tokens > 0
        assert gateway.metric("tokens_total", source="billed") == fake.billed_tokens
