"""The FastAPI routes: models, health, metrics and docs, with all errors in OpenAI's shape.

FastAPI keeps route functions alive, and everything they reference. So they reference no gateway: each request carries
the one that answers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import orjson
from fastapi import FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from app import __version__
from app.api import head, openapi, render
from app.api.asgi import Receive, Scope, Sender
from app.api.auth import Keys, Tenant
from app.errors import GatewayError, InvalidApiKey, InvalidRequest, MethodNotAllowed, ModelNotFound, NotFound
from app.gateway import Gateway
from app.metrics import CONTENT_TYPE, Metrics
from app.registry import PublicModel

GENERATION = "embedding_gateway"
"""The scope's key for the `Generation` that answers the request."""

_NO_STORE = {"cache-control": "no-store"}
"""Keeps caches on the way, which may know no credentials but `Authorization`, from serving a response to other callers,
or for too long."""


class Generation(Protocol):
    """One configuration's gateway and the keys in front of it."""

    @property
    def gateway(self) -> Gateway: ...
    @property
    def keys(self) -> Keys: ...


def _generation_of(request: Request) -> Generation:
    found: Generation = request.scope[GENERATION]
    return found


class _HeadAsGet:
    """Answers HEAD as GET (RFC 9110 9.3.2). The server knows the real method and omits the body."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Sender) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def build(metrics: Metrics, *, admin: bool, keys: bool) -> FastAPI:
    """Builds the FastAPI application. `admin` includes /metrics and /docs, which may have a port of their own; `keys`
    documents that callers need one."""
    api = _application(
        metrics,
        description="One OpenAI-compatible `/v1/embeddings` in front of every embedding vendor.",
        docs_url="/docs" if admin else None,
    )
    # For the documentation only: keys are checked in any case.
    security = [Security(HTTPBearer(auto_error=False, description="one of auth.keys"))] if keys else []
    _add_embeddings(api, security)
    _add_models(api, security)
    _add_health(api)
    if admin:
        _add_metrics(api, metrics)
    return api


def build_admin(metrics: Metrics, main_app: Callable[[], FastAPI]) -> FastAPI:
    """Builds /metrics and /docs for a port of their own; the docs are those of the current main application."""
    # No "Try it out": the routes are on another port, which is another origin to browsers.
    api = _application(metrics, swagger_ui_parameters={"supportedSubmitMethods": []})
    api.openapi = lambda: main_app().openapi()  # type: ignore[method-assign]  # FastAPI's documented way to replace it
    _add_metrics(api, metrics)
    return api


def _application(metrics: Metrics, **options: Any) -> FastAPI:
    api = FastAPIOffline(
        title="embedding-gateway",
        version=__version__,
        redoc_url=None,
        redirect_slashes=False,  # they would lead to the caller's Host, and clients drop the body or the key
        **options,
    )
    api.add_middleware(_HeadAsGet)
    _add_errors(api, metrics)
    return api


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, _NO_STORE, media_type="application/json")


def _add_errors(api: FastAPI, metrics: Metrics) -> None:
    rejected = {
        error.code: metrics.rejected_requests.labels(error.code)
        for error in (NotFound, MethodNotAllowed, InvalidApiKey)
    }

    @api.exception_handler(GatewayError)
    async def gateway_error(_: Request, error: GatewayError) -> Response:
        if error.code in rejected:
            rejected[error.code].inc()
        headers = {name.decode(): value.decode() for name, value in render.error_headers(error)}
        return Response(render.error_body(error), error.status, headers | _NO_STORE, media_type="application/json")

    @api.exception_handler(Exception)
    async def bug(request: Request, _: Exception) -> Response:
        return await gateway_error(request, GatewayError("internal error"))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        mapped: GatewayError
        path, method = request.scope["path"], request.scope["method"]
        if error.status_code == 405:
            mapped = MethodNotAllowed(f"{method[:20]} is not allowed on {path[:200]}")
        elif error.status_code == 404:
            mapped = NotFound(f"there is no route {path[:200]}; embeddings are at /v1/embeddings")
        else:
            mapped = InvalidRequest(str(error.detail))
        response = await gateway_error(request, mapped)
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response


def _add_embeddings(api: FastAPI, key: list[Any]) -> None:
    @api.post(
        "/v1/embeddings", openapi_extra=openapi.EMBEDDINGS, tags=["embeddings"], summary="Embed",
        dependencies=key,
    )  # fmt: skip
    async def embed() -> None:
        """OpenAI's request and response. Also on `/embeddings`, `/openai/v1/embeddings`, with a trailing
        slash, on `/v1/engines/{model}/embeddings` and on `/openai/deployments/{model}/embeddings`."""
        raise NotFound("embeddings are at /v1/embeddings")  # which app.main answers in front of FastAPI


def _add_models(api: FastAPI, key: list[Any]) -> None:
    async def list_models(request: Request) -> Response:
        gateway, tenant = _authenticate(request)
        await gateway.refresh()
        served = [(name, model) for name, model in gateway.names.items() if tenant.may_use(name, model.name)]
        return _json({"object": "list", "data": [_model_object(gateway, *each) for each in served]})

    async def get_model(request: Request, model: str) -> Response:
        gateway, tenant = _authenticate(request)
        name = model.removesuffix("/")
        tenant.check_known(name, gateway.names)
        found = await gateway.find(name)
        if not tenant.may_use(name, found.name):
            raise ModelNotFound.of(name)
        return _json(_model_object(gateway, name, found))

    listing = openapi.success("Every model that this key opens.", openapi.MODELS) | openapi.error_responses(401)
    single = openapi.success("The model.", openapi.MODEL) | openapi.error_responses(401, 404)
    for base in ("/v1/models", "/models", "/openai/v1/models", "/openai/models"):
        canonical = base == "/v1/models"
        for path in (base, base + "/"):
            api.get(
                path, include_in_schema=canonical and path == base, tags=["models"], summary="List models",
                responses=listing, dependencies=key,
            )(list_models)  # fmt: skip
        api.get(
            base + "/{model:path}", include_in_schema=canonical, tags=["models"], summary="One model", responses=single,
            dependencies=key,
        )(get_model)  # fmt: skip


def _authenticate(request: Request) -> tuple[Gateway, Tenant]:
    """The gateway that answers the request, and the caller's tenant. Raises `InvalidApiKey`."""
    generation = _generation_of(request)
    return generation.gateway, generation.keys.tenant(head.by_name(request.scope["headers"]))


def _model_object(gateway: Gateway, name: str, public: PublicModel) -> dict[str, Any]:
    """OpenAI's model object, extended by what is known of the model."""
    models, facts = [deployment.model for deployment in public.deployments], public.facts
    prefixed = next((model for model in models if model.prefixes), None)
    return {
        "id": name,
        "object": "model",
        "created": gateway.started,
        "owned_by": public.deployments[0].upstream,
        "dimensions": public.dimensions,
        "modalities": ["text", *(["image"] if facts.images else []), *(["video"] if facts.videos else [])],
        "sparse": facts.sparse,
        "dimension_choices": facts.dimension_choices if facts.matryoshka_dimensions is None else None,
        "shortened_here": facts.matryoshka_dimensions,
        "max_input_tokens": facts.max_tokens_per_input,
        "max_input_characters": facts.max_characters_per_input,
        "max_batch_tokens": facts.max_tokens_per_batch,
        "max_batch": facts.max_batch,
        "input_types": facts.roles,
        "prefixes": dict(zip(prefixed.roles, prefixed.prefixes, strict=True)) if prefixed else None,
        "instruct": facts.instruct,
        "upstreams": [deployment.name for deployment in public.deployments],
        "vector_space": public.space,
        "source": facts.source or None,
    }


def _add_health(api: FastAPI) -> None:
    @api.get("/healthz", tags=["operation"], summary="Alive")
    async def healthz() -> Response:
        return _json({"status": "ok"})

    @api.get(
        "/readyz", tags=["operation"], summary="Ready for traffic",
        responses={503: {"description": "Draining: send no more traffic."}},
    )  # fmt: skip
    async def readyz(request: Request) -> Response:
        """503 while draining. One line per upstream and cache tier: what is known without asking them."""
        state = _generation_of(request).gateway.status()
        return _json(state, 200 if state["status"] == "ready" else 503)


def _add_metrics(api: FastAPI, metrics: Metrics) -> None:
    @api.get("/metrics", tags=["operation"], summary="Prometheus metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        return Response(await metrics.exposition(), 200, _NO_STORE, media_type=CONTENT_TYPE)
