"""A fake of Baidu's embeddings: V1 (Wenxin Workshop), V2 (Qianfan) and their token services.

Facts: Baidu's pages on Embedding-V1, the V2 vector API and both tables of error codes, and
the qianfan SDK 0.4.12.3. Texts marked "own words" appear in none of these sources.
"""

import random
import re
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from .baidu_tables import MODELS, V1_MESSAGES, V2_ERRORS, BaiduModel
from .bce_signature import BadSignature, verify
from .faults import VendorError
from .upstream import Call, Embedded, FakeUpstream
from .vectors import Row, Text, Vector, numbers, texts_in, vector
from .wire import Reply, Request, json_reply

V1_PREFIX = "/rpc/2.0/ai_custom/v1/wenxinworkshop/embeddings/"
V2_PATH = "/v2/embeddings"
TOKEN_PATH = "/oauth/2.0/token"
BEARER_PATH = "/v1/BCE-BEARER/token"

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


def baidu_tokens(text: str) -> int:
    """Return Baidu's estimate: Han characters + 1.3 times the other words, rounded."""
    words = re.findall(r"\w+", _HAN.sub(" ", text))
    return max(1, round(len(_HAN.findall(text)) + 1.3 * len(words)))


@dataclass
class _Token:
    expires_at: float
    valid: bool = True


class FakeBaidu(FakeUpstream):
    """V1 and V2 in one server. V1 answers HTTP 200 even to errors; V2 has real statuses.

    V1 accepts an access token obtained with `api_key` and `secret_key`, or a signature made with
    `access_key` and `iam_secret_key`. V2 accepts `v2_key`, or a short-lived bearer token obtained with
    such a signature. `expires_in`: lifetime of an access token in seconds, measured on `clock`.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "rate_limit": "18",
        "quota": "17",
        "auth": "110",
        "unavailable": "2",
        "internal": "336000",
        "bad_input": "336003",
    }
    v2_aliases: ClassVar[Mapping[str, str]] = {
        "rate_limit": "rpm_rate_limit_exceeded",
        "quota": "account_overdue",
        "auth": "invalid_iam_token",
        "unavailable": "dispatch_internal_error",
        "internal": "internal_error",
        "bad_input": "invalid_argument",
    }

    def __init__(
        self,
        api_key: str = "fake-api-key",
        secret_key: str = "fake-secret-key",
        access_key: str = "ALTAKfakeaccesskey",
        iam_secret_key: str = "fakeiamsecretkey",
        v2_key: str = "bce-v3/ALTAK-fake/0123456789abcdef",
        *,
        expires_in: int = 2_592_000,
        clock: Callable[[], float] = time.monotonic,
        models: Mapping[str, BaiduModel] = MODELS,
        delay: float = 0.0,
        shuffle: bool = True,
        max_batch: int | None = None,
        concurrency_limit: int | None = None,
    ) -> None:
        super().__init__(delay=delay, shuffle=shuffle, max_batch=max_batch, concurrency_limit=concurrency_limit)
        self.api_key = api_key
        self.secret_key = secret_key
        self.access_key = access_key
        self.iam_secret_key = iam_secret_key
        self.v2_key = v2_key
        self.expires_in = expires_in
        self.clock = clock
        self.models = models
        self._tokens: dict[str, _Token] = {}

    # --- tokens ---------------------------------------------------------------------------

    @property
    def token_requests(self) -> int:
        """How many requests asked for an access token or a bearer token."""
        return sum(request.path in (TOKEN_PATH, BEARER_PATH) for request in self.requests)

    @property
    def tokens(self) -> list[str]:
        """Tokens issued and not invalidated since."""
        return list(self._tokens)

    def invalidate_tokens(self) -> None:
        """Forget all issued tokens: they now get error 110 (V2: invalid_iam_token)."""
        self._tokens.clear()

    def expire_tokens(self) -> None:
        """Expire all issued tokens: they now get error 111."""
        for token in self._tokens.values():
            token.expires_at = self.clock()

    def _issue(self, template: str, lifetime: int) -> str:
        secret = random.randbytes(16).hex()
        token = template.format(secret)
        self._tokens[token] = _Token(self.clock() + lifetime)
        return token

    def _oauth(self, request: Request) -> Reply:
        query = request.query
        if query.get("grant_type") != "client_credentials":
            return _oauth_error("unsupported_grant_type", "The authorization grant type", 400)
        if query.get("client_id") != self.api_key:
            return _oauth_error("invalid_client", "unknown client id", 401)
        if query.get("client_secret") != self.secret_key:
            return _oauth_error("invalid_client", "Client authentication failed", 401)
        template = f"24.{{}}.{self.expires_in}.{int(time.time()) + self.expires_in}.282335-1234567"
        return json_reply(
            {
                "refresh_token": "25.fake",
                "expires_in": self.expires_in,
                "session_key": "9mz",
                "access_token": self._issue(template, self.expires_in),
                "scope": "public",
                "session_secret": "fake",
            }
        )

    def _bearer(self, request: Request) -> Reply:
        try:
            self._verify(request)
        except BadSignature:
            return _v2_error(401, "invalid_iam_token", "invalid_request_error", "bad signature")
        lifetime = int(request.query.get("expireInSeconds", "43200"))
        now = datetime.now(UTC)
        return json_reply(
            {
                "token": self._issue(f"bce-v3/{self.access_key}/{{}}", lifetime),
                "createTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "expireTime": (now + timedelta(seconds=lifetime)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )

    def _verify(self, request: Request) -> None:
        secrets = {self.access_key: self.iam_secret_key}
        path = request.target.split("?")[0]
        now = datetime.now(UTC)
        verify(request.method, path, request.query, request.headers, secrets, now)

    # --- requests -------------------------------------------------------------------------

    def expected(self, model: str, text: str) -> Vector:
        """Return the vector this server answers with; `model` is the V1 or the V2 name."""
        name = model.lower().replace("_", "-")
        return vector(name, text, self.models[name].dimensions)

    def is_embedding(self, request: Request) -> bool:
        known_path = request.path.startswith(V1_PREFIX) or request.path == V2_PATH
        return request.method == "POST" and known_path

    def texts_of(self, request: Request) -> list[Text]:
        return texts_in(request.json.get("input")) if isinstance(request.json, dict) else []

    def other(self, request: Request) -> Reply:
        if request.path == TOKEN_PATH:
            return self._oauth(request)
        if request.path == BEARER_PATH:
            return self._bearer(request)
        if request.path == V2_PATH:
            return self.refuse(request, "method_not_supported")
        return self.refuse(request, 336101 if request.path.startswith(V1_PREFIX) else 3)

    def embed(self, call: Call) -> Embedded | Reply:
        return self._v2(call) if call.path == V2_PATH else self._v1(call)

    def _v1(self, call: Call) -> Embedded | Reply:
        refusal = self._check_v1_key(call)
        if refusal is not None:
            return refusal
        name = call.path.removeprefix(V1_PREFIX).replace("_", "-")
        # A hyphen in place of an underscore, or the reverse, makes it another path.
        if name not in self.models or call.path != V1_PREFIX + self.models[name].v1_name:
            return self.refuse(call, 3)
        body = call.json
        # A bare string got "Invalid JSON": Langchain-Chatchat pull request 2208.
        if not isinstance(body, dict) or isinstance(body.get("input"), str):
            return self.refuse(call, 336002)
        problem = self._problem(self.models[name], body.get("input"))
        if problem is not None:
            code = {"tokens": 336103, "characters": 336007}.get(problem[0], 336003)
            return self.refuse(call, code, problem[1])
        return self._answer(call, name, {})

    def _check_v1_key(self, call: Call) -> Reply | None:
        access_token = call.query.get("access_token")
        if access_token is None:
            if not call.headers.get("authorization", "").startswith("bce-auth-v1"):
                return self.refuse(call, 100)
            try:
                self._verify(call)
            except BadSignature:
                return self.refuse(call, 14)
            return None
        token = self._tokens.get(access_token)
        if token is None:
            return self.refuse(call, 110)
        return self.refuse(call, 111) if token.expires_at <= self.clock() else None

    def _v2(self, call: Call) -> Embedded | Reply:
        token = self._tokens.get(call.bearer or "")
        short_lived = token is not None and str(call.bearer).startswith("bce-v3/")
        alive = token is not None and token.expires_at > self.clock()
        if call.bearer != self.v2_key and not (short_lived and alive):
            return self.refuse(call, "invalid_iam_token")
        body = call.json
        if not isinstance(body, dict):
            return self.refuse(call, "malformed_json")
        name = body.get("model")
        if not name:
            return self.refuse(call, "invalid_model", "model is empty")
        if name not in self.models:
            unknown = VendorError("invalid_model", status=401)
            return self.error_reply(call, unknown)
        problem = self._problem(self.models[name], body.get("input"))
        if problem is not None:
            code = {"tokens": "tokens_too_long", "characters": "characters_too_long"}
            return self.refuse(call, code.get(problem[0], "invalid_argument"), problem[1])
        if body.get("encoding_format", "float") != "float":
            return self.refuse(call, "invalid_argument", "encoding_format only supports float")
        return self._answer(call, name, {"model": name})

    def _problem(self, model: BaiduModel, raw_input: Any) -> tuple[str, str] | None:
        """Return what is wrong with the input, as (kind, the vendor's message), or None."""
        if not isinstance(raw_input, list) or not all(isinstance(text, str) for text in raw_input):
            return "form", "input should be a list of strings"  # own words
        limit = self.max_batch or model.rows
        if not raw_input or not all(raw_input):
            return "empty", "message content can not be empty"
        if len(raw_input) > limit:
            return "rows", f"the max input length is {limit}"  # own words
        if any(len(text) > model.characters for text in raw_input):
            return "characters", f"the max input characters is {model.characters}"
        if any(baidu_tokens(text) > model.tokens for text in raw_input):
            return "tokens", f"Prompt tokens too long: the max input tokens is {model.tokens}"
        return None

    # --- answers --------------------------------------------------------------------------

    def _answer(self, call: Call, name: str, extra: dict[str, Any]) -> Embedded:
        texts = [str(text) for text in call.texts]
        rows = [Row(index, text, self.expected(name, text)) for index, text in enumerate(texts)]
        tokens = sum(map(baidu_tokens, texts))

        def render(shuffled: list[Row]) -> Reply:
            data = [{"object": "embedding", "embedding": numbers(row), "index": row.index} for row in shuffled]
            answer = {"id": _new_id(), "object": "embedding_list", "created": int(time.time())}
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return json_reply({**answer, **extra, "data": data, "usage": usage}, headers=_HEADERS)

        return Embedded(rows, tokens, render)

    def error_reply(self, request: Request, error: VendorError) -> Reply:
        if request.path in (V2_PATH, BEARER_PATH):
            name = self.v2_aliases.get(error.name, error.name)
            status, kind, message = V2_ERRORS.get(name, (400, "invalid_request_error", name))
            words = error.message or message
            return _v2_error(error.status or status, name, kind, words, error.headers)
        code = int(self.aliases.get(error.name, error.name))
        content: dict[str, Any] = {"error_code": code}
        content["error_msg"] = error.message or V1_MESSAGES.get(code, "Unknown error")
        if code >= 336_000:
            content["id"] = _new_id()  # errors of Baidu's API gateway have none
        return json_reply(content, error.status or 200, {**_HEADERS, **error.headers})


_HEADERS = {"Content-Type": "application/json;charset=utf-8", "Statement": "AI-generated"}


def _new_id() -> str:
    return "as-" + "".join(random.choices(string.ascii_lowercase + string.digits, k=10))


def _oauth_error(error: str, description: str, status: int) -> Reply:
    return json_reply({"error": error, "error_description": description}, status)


def _v2_error(status: int, code: str, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    error = {"code": code, "message": message, "type": kind}
    return json_reply({"error": error, "id": _new_id()}, status, headers)
