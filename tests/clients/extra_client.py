"""Runs in .venv-extra, which has none of the project's packages: `extra_client.py litellm|haystack '{…}'`.

Calls the gateway through one of the heavy clients with its defaults, and prints the results as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

HERE = {None, "", "localhost", "127.0.0.1"}


def only_here(event: str, args: tuple[Any, ...]) -> None:
    """Ends the script on a connection to any other host: a client might ignore a mere refusal."""
    if event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if host not in HERE:
        sys.stderr.write(f"tests do not talk to {host}\n")
        sys.stderr.flush()
        raise SystemExit(3)


class Notes(dict[str, Any]):
    def take(self, name: str, ask: Callable[[], Any]) -> None:
        try:
            self[name] = {"value": ask()}
        except Exception as error:
            status = getattr(error, "status_code", None)
            self[name] = {"error": {"class": type(error).__name__, "status": status, "message": str(error)}}


def ask_litellm(values: dict[str, Any], notes: Notes) -> None:
    import litellm  # type: ignore[import-not-found,unused-ignore]

    texts, named = values["texts"], f"openai/{values['model']}"
    slashed = f"openai/{values['slashed']}"

    def parameters(model: str = named, **options: Any) -> dict[str, Any]:
        return {"model": model, "api_base": values["base_url"], "api_key": values["key"], **options}

    def ask(**options: Any) -> Any:
        return litellm.embedding(**parameters(**options)).model_dump()

    notes.take("list", lambda: ask(input=texts))
    notes.take("string", lambda: ask(input=texts[0]))
    notes.take("slashed", lambda: ask(model=slashed, input=texts))
    notes.take("asynchronous", lambda: asyncio.run(litellm.aembedding(**parameters(input=texts))).model_dump())
    notes.take("slash", lambda: ask(input=texts, api_base=f"{values['base_url']}/"))
    notes.take("as its own proxy", lambda: ask(model=f"litellm_proxy/{values['model']}", input=texts))
    notes.take("base64", lambda: ask(input=texts, encoding_format="base64"))
    notes.take("ids", lambda: ask(input=[[15339, 1917], [9906]]))
    notes.take("dimensions", lambda: ask(input=texts, dimensions=256, user="user-1"))
    notes.take("dimensions, unknown model", lambda: ask(model=slashed, input=texts, dimensions=256))
    allowed = {"dimensions": 256, "allowed_openai_params": ["dimensions"]}
    notes.take("dimensions, allowed", lambda: ask(model=f"openai/{values['alias']}", input=texts, **allowed))
    notes.take("many", lambda: ask(input=values["many"], dimensions=16))
    notes.take("wrong key", lambda: ask(input="hi", api_key="sk-wrong"))
    notes.take("unknown model", lambda: ask(model="openai/text-embedding-9", input="hi"))
    notes.take("empty", lambda: ask(input=["a", "", "b"]))


def ask_haystack(values: dict[str, Any], notes: Notes) -> None:
    from haystack import Document  # type: ignore[import-not-found,unused-ignore]
    from haystack.components.embedders import (  # type: ignore[import-not-found,unused-ignore]
        AzureOpenAITextEmbedder,
        OpenAIDocumentEmbedder,
        OpenAITextEmbedder,
    )
    from haystack.utils import Secret  # type: ignore[import-not-found,unused-ignore]

    texts = values["texts"]

    def make(kind: Any, **options: Any) -> Any:
        key = Secret.from_token(options.pop("key", values["key"]))
        return kind(**{"api_key": key, "api_base_url": values["base_url"], "model": values["model"], **options})

    def documents(given: list[Any], **options: Any) -> Any:
        got = make(OpenAIDocumentEmbedder, progress_bar=False, **options).run(given)
        return {"embeddings": [document.embedding for document in got["documents"]], "meta": got["meta"]}

    async def asynchronously() -> Any:
        embedder = make(OpenAIDocumentEmbedder, progress_bar=False)
        got = await embedder.run_async(contents)
        await embedder.close_async()
        return [document.embedding for document in got["documents"]]

    contents = [Document(content=text) for text in texts]
    notes.take("texts", lambda: [make(OpenAITextEmbedder).run(text)["embedding"] for text in texts])
    notes.take("text, all", lambda: make(OpenAITextEmbedder).run(texts[0]))
    notes.take("documents", lambda: documents(contents))
    notes.take("slashed", lambda: documents(contents, model=values["slashed"]))
    notes.take("asynchronous", lambda: asyncio.run(asynchronously()))
    notes.take("dimensions", lambda: documents(contents, dimensions=256))
    notes.take("many", lambda: documents([Document(content=text) for text in values["many"]], dimensions=16))
    titled = [Document(content="text", meta={"title": "a title"})]
    notes.take("meta", lambda: documents(titled, meta_fields_to_embed=["title"], prefix="passage: "))
    azure = {
        "azure_endpoint": values["base_url"].removesuffix("/v1"),
        "azure_deployment": values["slashed"],
        "api_key": Secret.from_token(values["key"]),
    }
    notes.take("azure", lambda: AzureOpenAITextEmbedder(**azure).run(texts[0])["embedding"])
    notes.take("wrong key", lambda: make(OpenAITextEmbedder, key="sk-wrong").run("hi"))
    notes.take("unknown model", lambda: make(OpenAITextEmbedder, model="text-embedding-9").run("hi"))
    holed = [Document(content=text) for text in ("a", "", "b")]
    notes.take("empty", lambda: documents(holed))
    notes.take("empty, strict", lambda: documents(holed, raise_on_failure=True))


def main() -> None:
    sys.addaudithook(only_here)
    notes = Notes()
    {"litellm": ask_litellm, "haystack": ask_haystack}[sys.argv[1]](json.loads(sys.argv[2]), notes)
    sys.stdout.write("\n" + json.dumps(notes) + "\n")  # the last line, after whatever a client prints


if __name__ == "__main__":
    main()
