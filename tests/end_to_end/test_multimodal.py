"""Images, videos and texts, through the whole program to DashScope's multimodal models."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from app.config.load import ConfigError
from app.pipeline import canary
from tests.end_to_end.cases import dashscope_alone as config
from tests.fakes import FakeDashScope, FakeOpenAI, faults
from tests.fakes.wire import json_reply
from tests.harness import Running, running, settings_of
from tests.redis_server import RedisServer

V1, VL, FUSING = "multimodal-embedding-v1", "qwen3-vl-embedding", "qwen2.5-vl-embedding"
PIXEL = "data:image/png;base64,iVBORw0KGgo="
ADDRESS = "https://images.example/cat.png"
VIDEO = "https://images.example/cat.mp4"


@pytest.fixture
def fake() -> Iterator[FakeDashScope]:
    with FakeDashScope(api_key="sk-fake") as fake:
        yield fake


@pytest.fixture
def gateway(fake: FakeDashScope) -> Iterator[Running]:
    with running(config(fake)) as gateway:
        yield gateway


def right(fake: FakeDashScope, model: str, response: httpx.Response, *contents: str, dimensions: Any = None) -> None:
    assert response.status_code == 200, response.text
    rows = response.json()["data"]
    assert [row["index"] for row in rows] == list(range(len(contents)))
    for content, row in zip(contents, rows, strict=True):
        assert np.array_equal(np.array(row["embedding"], "<f4"), fake.expected(model, content, dimensions)), content


def refused(response: httpx.Response, param: str, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    for word in words:
        assert word in error["message"]


def test_every_form_of_content_may_stand_beside_the_others(fake: FakeDashScope, gateway: Running) -> None:
    given = [
        "a plain text",
        {"text": "a text"},
        {"image": ADDRESS},
        {"image": PIXEL},
        {"video": VIDEO},
        {"type": "text", "text": "a part"},
        {"type": "image_url", "image_url": {"url": ADDRESS + "?2"}},
        {"type": "image_url", "image_url": ADDRESS + "?3"},
    ]
    contents = ["a plain text", "a text", ADDRESS, PIXEL, VIDEO, "a part", ADDRESS + "?2", ADDRESS + "?3"]
    for model in (V1, VL):
        response = gateway.post({"model": model, "input": given})
        right(fake, model, response, *contents)
    sent = [call.json["input"]["contents"] for call in fake.calls]
    assert {"text": "a part"} in [each for contents in sent for each in contents]
    assert all(set(each) <= {"text", "image", "video"} for contents in sent for each in contents)


def test_a_call_carries_as_many_images_as_the_model_takes(fake: FakeDashScope, gateway: Running) -> None:
    images = [{"image": f"{ADDRESS}?{i}"} for i in range(12)]
    for model, calls in ((V1, 12), (VL, 3)):
        fake.calls.clear()
        right(fake, model, gateway.post({"model": model, "input": images}), *(f"{ADDRESS}?{i}" for i in range(12)))
        assert len(fake.calls) == calls
    texts = [f"text {i}" for i in range(50)]
    fake.calls.clear()
    right(fake, V1, gateway.post({"model": V1, "input": texts}), *texts)
    assert len(fake.calls) == 3, "texts fill a call as ever"


def test_a_model_that_fuses_what_a_call_holds_is_asked_for_one_at_a_time(fake: FakeDashScope, gateway: Running) -> None:
    given = ["a text", {"image": ADDRESS}, {"video": VIDEO}]
    right(fake, FUSING, gateway.post({"model": FUSING, "input": given}), "a text", ADDRESS, VIDEO)
    assert len(fake.calls) == 3


def test_one_image_is_paid_for_once_however_it_is_written_down(fake: FakeDashScope) -> None:
    with RedisServer() as redis, running(config(fake, cache={"memory": None, "redis": {"url": redis.url}})) as gateway:
        first = gateway.post({"model": V1, "input": [{"image": PIXEL}]})
        right(fake, V1, first, PIXEL)
        for again in (PIXEL, PIXEL.replace("image/png", "IMAGE/PNG"), PIXEL.replace(";base64", ";charset=x;base64")):
            response = gateway.post({"model": V1, "input": [{"image": again}]})
            assert response.json()["data"] == first.json()["data"]
            assert response.headers["x-embedding-cache"] == "hit"
        others = [{"image": PIXEL.replace("png", "jpeg")}, {"image": PIXEL.replace("iV", "aV")}, {"text": PIXEL}]
        for other in others:
            assert gateway.post({"model": V1, "input": [other]}).headers["x-embedding-cache"] == "miss"


def test_an_address_is_never_asked_by_us(gateway: Running) -> None:
    with FakeOpenAI() as elsewhere:
        assert gateway.post({"model": V1, "input": [{"image": elsewhere.url + "/cat.png"}]}).status_code == 200
        assert not elsewhere.requests


def test_usage_counts_images_as_the_vendor_does(fake: FakeDashScope, gateway: Running) -> None:
    answer = {
        "output": {"embeddings": [{"index": 0, "embedding": [1.0] * 1024, "type": "image"}]},
        "usage": {"input_tokens": 0, "image_tokens": 247, "image_count": 1},
    }
    fake.fail(faults.Answer("images counted", json_reply(answer)), times=1)
    response = gateway.post({"model": V1, "input": [{"image": ADDRESS}]})
    assert response.json()["usage"]["prompt_tokens"] == 247


def test_a_text_is_not_billed_the_image_beside_it(fake: FakeDashScope, gateway: Running) -> None:
    rows = [{"index": i, "embedding": [1.0] * 1024, "type": "text"} for i in range(2)]
    answer = {"output": {"embeddings": rows}, "usage": {"input_tokens": 9, "image_tokens": 1000, "image_count": 1}}
    fake.fail(faults.Answer("images counted", json_reply(answer)), times=1)
    text = "some eight words, or so"
    mixed = gateway.post({"model": V1, "input": [{"image": ADDRESS}, text]})
    assert mixed.json()["usage"]["prompt_tokens"] == 1009
    cached = [gateway.post({"model": V1, "input": [each]}) for each in (text, {"image": ADDRESS})]
    told = [response.json()["usage"]["prompt_tokens"] for response in cached]
    assert [response.headers["x-embedding-cache"] for response in cached] == ["hit", "hit"]
    assert 5 <= told[0] <= 9
    assert told[1] >= 1000


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({}, "exactly one"),
        ({"text": "a", "image": ADDRESS}, "exactly one"),
        ({"audio": ADDRESS}, "exactly one"),
        ({"type": "input_audio", "input_audio": {}}, "image_url"),
        ({"text": ""}, "empty"),
        ({"text": 5}, "string"),
        ({"image": 5}, "string"),
        ({"type": "image_url", "image_url": {}}, "string"),
        ({"image": "file:///etc/passwd"}, "http"),
        ({"image": "http://a b"}, "http"),
        ({"image": "http://a\nb"}, "http"),
        ({"image": "data:image/png;base64,"}, "empty"),
        ({"image": "data:image/png;base64,!!!"}, "base64"),
        ({"video": PIXEL.replace("image/png", "video/mp4")}, "address"),
    ],
    ids=str,
)
def test_content_that_is_none_is_a_400_by_its_place(gateway: Running, item: Any, words: str) -> None:
    refused(gateway.post({"model": V1, "input": ["a text", item]}), "input[1]", words)


def test_what_a_model_does_not_take_is_a_400_before_anything_is_sent(fake: FakeDashScope, gateway: Running) -> None:
    response = gateway.post({"model": "text-embedding-v3", "input": ["a text", {"image": ADDRESS}]})
    refused(response, "input[1]", "image", "text only")
    big = "data:image/png;base64," + "A" * (4 * 2**20 + 400)
    response = gateway.post({"model": V1, "input": ["a text", {"image": ADDRESS}, {"image": big}]})
    refused(response, "input[2]", "bytes", str(3 * 2**20))
    refused(gateway.post({"model": V1, "input": ["word " * 600]}), "input[0]", "512")
    assert not fake.calls


def test_an_image_is_as_large_as_the_model_takes_to_the_byte(fake: FakeDashScope, gateway: Running) -> None:
    for more in (0, 1, 2):
        image = base64.b64encode(bytes(3 * 2**20 - 1 + more)).decode()
        response = gateway.post({"model": V1, "input": [{"image": f"data:image/png;base64,{image}"}]})
        if more == 2:
            refused(response, "input[0]", str(3 * 2**20 + 1), str(3 * 2**20))
        else:
            assert response.status_code == 200, response.text
    assert len(fake.calls) == 2


def test_an_image_that_is_refused_is_named_and_the_others_are_kept(fake: FakeDashScope, gateway: Running) -> None:
    guilty = f"{ADDRESS}?guilty"
    fake.fail(faults.vendor_error("DataInspectionFailed"), times=None, when=lambda it: any("guilty" in t for t in it))
    texts, image = [f"text {i}" for i in range(6)], {"image": ADDRESS}
    refused(gateway.post({"model": VL, "input": [*texts, {"image": guilty}, image]}), "input[6]")
    asked = len(fake.calls)
    right(fake, VL, gateway.post({"model": VL, "input": [*texts, image]}), *texts, ADDRESS)
    assert len(fake.calls) == asked


def test_an_image_that_cannot_be_fetched_is_asked_for_twice_and_then_its_callers_fault(
    fake: FakeDashScope, gateway: Running
) -> None:
    lost = f"{ADDRESS}?lost"
    fake.fail(
        faults.vendor_error("InvalidParameter.DataInspection", "Unable to download the media resource", status=400),
        times=None,
        when=lambda it: any("lost" in t for t in it),
    )
    texts = [f"text {i}" for i in range(6)]
    refused(gateway.post({"model": VL, "input": [*texts, {"image": lost}]}), "input[6]", "could not fetch or read")
    assert [call.rows for call in fake.calls].count(1) == 2
    asked = len(fake.calls)
    right(fake, VL, gateway.post({"model": VL, "input": texts}), *texts)
    assert len(fake.calls) == asked, "the others are kept"
    for i in range(8):
        refused(gateway.post({"model": VL, "input": [{"image": f"{lost}{i}"}]}), "input[0]")
    assert gateway.metric("upstream_available", upstream="up", model=VL) == 1


def test_shorter_vectors_of_images_are_the_vendors(fake: FakeDashScope, gateway: Running) -> None:
    response = gateway.post({"model": VL, "input": [{"image": ADDRESS}], "dimensions": 512})
    right(fake, VL, response, ADDRESS, dimensions=512)
    assert gateway.post({"model": V1, "input": [{"image": ADDRESS}], "dimensions": 512}).status_code == 400


def test_a_model_that_may_have_no_images_is_asked_for_texts_where_it_is(fake: FakeDashScope) -> None:
    models = {"texts": {"deployments": [{"upstream": "up", "model": VL}], "images": 0, "videos": 0}}
    with running({**config(fake), "models": models}) as gateway:
        right(fake, VL, gateway.post({"model": "texts", "input": "a text"}), "a text")
        refused(gateway.post({"model": "texts", "input": [{"image": ADDRESS}]}), "input[0]", "takes text only")
        refused(gateway.post({"model": "texts", "input": [{"video": VIDEO}]}), "input[0]", "takes text only")


def test_compatible_mode_has_no_such_models(fake: FakeDashScope) -> None:
    upstream = {"type": "dashscope", "mode": "compatible", "api_key": "sk-fake", "base_url": fake.url}
    with running({"upstreams": {"up": upstream}}) as gateway:
        assert gateway.post({"model": V1, "input": "a text"}).status_code == 404


def test_models_say_what_they_take(gateway: Running) -> None:
    told = {each["id"]: each for each in gateway.get("/v1/models").json()["data"]}
    assert told[V1]["modalities"] == ["text", "image", "video"]
    assert told["text-embedding-v3"]["modalities"] == ["text"]
    assert (told["text-embedding-v3"]["sparse"], told[V1]["sparse"]) == (True, False)


def test_a_model_that_answers_hours_later_is_refused_with_one_that_does_not(gateway: Running) -> None:
    for name in ("text-embedding-async-v1", "up/text-embedding-async-v2"):
        response = gateway.post({"model": name, "input": "a text"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found")
        assert "use text-embedding-v4" in error["message"]


@pytest.mark.parametrize("mode", ["native", "compatible"])
def test_a_file_that_names_such_a_model_is_refused_with_one_that_does_not(mode: str) -> None:
    up = {"type": "dashscope", "mode": mode, "api_key": "sk-fake"}
    deployments = [{"upstream": "up", "model": name} for name in ("text-embedding-v3", "text-embedding-async-v2")]
    with pytest.raises(ConfigError) as refusal:
        settings_of({"upstreams": {"up": up}, "models": {"docs": {"deployments": deployments[1:]}}})
    (mistake,) = refusal.value.mistakes
    assert mistake.endswith(
        "config.yaml: models.docs.deployments[0].model: text-embedding-async-v2 takes files and answers hours later; "
        "use text-embedding-v4, any number of texts at once"
    )
    settings_of({"upstreams": {"up": up}, "models": {"docs": {"deployments": deployments[:1]}}})


def test_an_operator_knows_better_what_a_model_takes(fake: FakeDashScope) -> None:
    def served(model: str, **facts: Any) -> dict[str, Any]:
        return config(fake, models={"own": {"deployments": [{"upstream": "up", "model": model}], **facts}})

    images = [{"image": f"{ADDRESS}?{i}"} for i in range(4)]
    with running(served(VL, images=2, videos=0, dimension_choices=[512])) as gateway:
        right(fake, VL, gateway.post({"model": "own", "input": images}), *(each["image"] for each in images))
        assert [len(call.texts) for call in fake.calls] == [2, 2]
        refused(gateway.post({"model": "own", "input": [{"video": VIDEO}]}), "input[0]", "text and images only")
        ask = {"model": "own", "input": "a text"}
        right(fake, VL, gateway.post({**ask, "dimensions": 512}), "a text", dimensions=512)
        refused(gateway.post({**ask, "dimensions": 768}), "dimensions")
    with running(served("text-embedding-v3", sparse=False, instruct=True, max_characters_per_input=10)) as gateway:
        refused(gateway.post({**ask, "output_type": "sparse"}), "output_type")
        refused(gateway.post({**ask, "input": "eleven char"}), "input[0]", "11 characters", "10")
        assert gateway.post({**ask, "instruct": "find it"}).status_code == 200
        assert fake.calls[-1].json["parameters"]["instruct"] == "find it"


def test_an_instruction_goes_where_there_is_a_word_for_it(fake: FakeDashScope) -> None:
    compatible = {**config(fake)["upstreams"]["up"], "mode": "compatible", "base_url": fake.url + "/compatible-mode/v1"}
    deployments = [{"upstream": name, "model": "text-embedding-v3"} for name in ("compatible", "up")]
    settings = config(fake, models={"own": {"deployments": deployments, "instruct": True}})
    settings["upstreams"]["compatible"] = compatible
    with running(settings) as gateway:
        for number in range(5):
            assert gateway.post({"model": "own", "input": f"{number}", "instruct": "find it"}).status_code == 200
    calls = [call.json for call in fake.calls if call.texts[0] != canary.TEXT]
    assert [call["parameters"]["instruct"] for call in calls] == ["find it"] * 5


def test_a_dialect_without_words_for_images_is_sent_none() -> None:
    upstream = {"type": "dashscope", "mode": "compatible", "api_key": "sk-canary-0123"}
    models: dict[str, Any] = {"m": {"deployments": [{"upstream": "up", "model": "multimodal-embedding-v1"}]}}
    models["m"]["images"] = 4
    with pytest.raises(ConfigError, match=r"models\.m\.images: no upstream of this model can express it"):
        settings_of({"upstreams": {"up": upstream}, "models": models})
    models["m"]["images"] = 0
    with running({"upstreams": {"up": upstream}, "models": models}) as gateway:
        response = gateway.post({"model": "m", "input": [{"image": "https://example.com/x.png"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input[0]")
