"""Every upstream dialect by its `type` in the configuration: one module each, one entry here.

To add one (a server that speaks OpenAI's API needs no code, only `type: openai` and its `base_url`):

1. Write `app/upstreams/name.py`: a settings class (its `key_variable` names the variable in messages);
   `build_request`, `parse_error` and `parse_response` in an `Adapter`; and a `KIND` (`app.config.kind`) that ties
   them to credentials and to the environment variables that switch the upstream on. What dialects share is in `wire`
   (requests), `replies` (errors and bills; if the vendor's errors have a shape that `error_fields` does not know,
   pass `make_error` the message yourself), `json_vectors` and `auth`. No I/O, no retries, no batching.
2. Add it to `UPSTREAMS` here, and its models to `app.catalog` under the same name; or give `KIND` a `discover` that
   asks the upstream for them. What a model can do (roles, lengths, instructions) stands in its row: an unlisted model
   is sent text only.
3. Put sample replies into `tests/upstreams/replies/name/`; the contract tests find them.
4. Write a fake server in `tests/fakes/`, verified with the vendor's own SDK, and add it to the cases in
   `tests/end_to_end/`, and to the upstreams in `tests/soak/vendors.py` and `tests/fuzz/test_canary_keys.py`.
5. Add it to `config.example.yaml` and to README's tables, and its variables to the list at the top of that file and
   to `docker-compose.yml`; tests fail until all of them are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from app.config import UpstreamKind
from app.upstreams import baidu, dashscope, gemini, lexical, ollama, openai

UPSTREAMS: Mapping[str, UpstreamKind] = MappingProxyType(
    {kind.name: kind for kind in (dashscope.KIND, baidu.KIND, openai.KIND, gemini.KIND, ollama.KIND, lexical.KIND)}
)
