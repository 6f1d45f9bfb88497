"""Brings a request's parameters into the model's canonical form, so that equal requests have equal keys.

Defaults are filled in, what the model would ignore is left out, and what it cannot do is refused here rather than after
an upstream call.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from app.catalog import Model, Role, combined
from app.config import ModelSettings
from app.errors import InvalidRequest, UnsupportedDimensions
from app.pipeline.deployment import honours
from app.pipeline.prefix import prefix_of
from app.types import DATA_URI, Embedder, EmbedRequest, EmbedResult, Input, Params


class Prepare:
    """Validates and completes a request's parameters. `models` are the facts of each deployment; `settings` are the
    operator's defaults; `name` is the model's public name."""

    def __init__(self, inner: Embedder, name: str, models: Sequence[Model], settings: ModelSettings | None) -> None:
        self._inner, self._name = inner, name
        self._models, self._facts = models, combined(models)
        self._dimensions = settings.dimensions if settings else None
        self._input_type = settings.input_type if settings else None
        self._canonical: dict[Params, Params] = {}

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        params = self._canonical.get(request.params)
        if params is None:
            params = self.canonical(request.params)
            # Clients send a handful of combinations. Bounded, and without instructions, which may be of any size: no
            # client may fill the memory.
            if len(self._canonical) < 256 and params.instruct is None:
                self._canonical[request.params] = params
        if request.media:
            self._check_media(request.inputs)
        return await self._inner(request if params == request.params else replace(request, params=params))

    def _check_media(self, inputs: Sequence[Input]) -> None:
        """Raises `InvalidRequest` for the first image or video that this model does not take."""
        for i, media in enumerate(inputs):
            if isinstance(media, str):
                continue
            # Supported by all deployments: any of them may serve the request.
            if not (self._facts.images if media.kind == "image" else self._facts.videos):
                also = " and images" if self._facts.images else ""
                raise InvalidRequest(
                    f"input[{i}] is {'an' if media.kind == 'image' else 'a'} {media.kind}; "
                    f"model {self._name!r} takes text{also} only",
                    param=f"input[{i}]",
                )
            limit, data_uri = self._facts.max_image_bytes, DATA_URI.match(media.source)
            if limit is None or data_uri is None:
                continue
            # Four characters of base64 are three bytes, less the padding.
            size = (len(media.source) - data_uri.end()) * 3 // 4 - media.source.count("=", -2)
            if size > limit:
                raise InvalidRequest(
                    f"input[{i}] is an image of {size} bytes; model {self._name!r} takes at most {limit}",
                    param=f"input[{i}]",
                )

    def canonical(self, params: Params) -> Params:
        """`params` in the model's canonical form. Raises `InvalidRequest` for what the model cannot do."""
        if params.output_type != "dense" and not self._facts.sparse:
            raise InvalidRequest(f"model {self._name!r} gives dense vectors only", param="output_type")
        if params.instruct is not None and not self._facts.instruct:
            raise InvalidRequest(f"model {self._name!r} takes no instruction", param="instruct")
        canonical = replace(
            params,
            dimensions=self._dimensions_for(params.dimensions or self._dimensions),
            input_type=self._role(params.input_type or self._input_type),
        )
        if not self._honoured(canonical):
            raise self._unsupported(canonical)
        return canonical

    def _honoured(self, params: Params) -> bool:
        return any(honours(each, params) for each in self._models)

    def _unsupported(self, params: Params) -> InvalidRequest:
        """The error for parameters that no deployment honours together."""
        if params.instruct is not None and self._honoured(replace(params, input_type="query")):
            message = f"model {self._name!r} takes an instruction for queries only; say input_type: query"
            return InvalidRequest(message, param="instruct")
        return InvalidRequest(
            f"no deployment of model {self._name!r} supports this combination of input_type, instruct and output_type",
            param="input_type" if params.input_type else "instruct",
        )

    def _role(self, requested: Role | None) -> Role | None:
        """The role if it makes a difference; None if the model knows no roles, or if it makes none for a deployment:
        then it makes none for those either whose vectors are the same. Raises `InvalidRequest`."""
        if requested is None or not self._facts.roles:
            return None
        if requested not in self._facts.roles:
            raise InvalidRequest(
                f"model {self._name!r} is reached through an API that cannot mark a text as a {requested}",
                param="input_type",
            )
        return None if any(_ignores(each, requested) for each in self._models) else requested

    def _dimensions_for(self, requested: int | None) -> int | None:
        """The length requested, if the model can make it; None if it is the default. Raises `UnsupportedDimensions`."""
        model = self._facts
        if requested is None or requested == model.dimensions:
            return None
        choices = model.dimension_choices if model.matryoshka_dimensions is None else model.matryoshka_dimensions
        if choices is None:
            only = f"only {model.dimensions}" if model.dimensions else "no other length"
            raise UnsupportedDimensions(f"model {self._name!r} gives {only}, not {requested}", param="dimensions")
        if choices and requested not in choices:
            listed = ", ".join(map(str, sorted(choices)))
            raise UnsupportedDimensions(
                f"model {self._name!r} gives {listed} dimensions, not {requested}", param="dimensions"
            )
        if not choices and model.dimensions is not None and requested > model.dimensions:
            raise UnsupportedDimensions(
                f"model {self._name!r} gives at most {model.dimensions} dimensions, not {requested}",
                param="dimensions",
            )
        return requested


def _ignores(model: Model, role: Role) -> bool:
    """Whether a text in this role is to the model as one in none."""
    return role == model.default_role or bool(model.prefixes and not prefix_of(model, role, None))
