"""What a router reads of an OpenAI request: the model, the prompt, the conversation. The rest passes unread.

    POST /v1/completions        prompt: text, token ids, or a list of either (the first one counts)
    POST /v1/chat/completions   messages: which only a worker can turn into tokens

A prompt is *plain* when its tokens are all that its KV depends on: what carries a picture or a salt is not
asked of the index under names of tokens alone.

The session is the header ``x-kvcache-session``, else ``prompt_cache_key``, else ``user``; else, where tokens
are not known, a digest of how the prompt begins: then prompts that begin alike go to the same worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

import msgspec

from kvcache.errors import BadInput

SESSION_CHARS_MAX = 256
MODEL_CHARS_MAX = 512
"""As of a worker in the fleet's file. Names of models are remembered."""
BEGINNING_CHARS = 1_024
PROMPT_TOKENS_MAX = 1 << 20
CHARS_A_TOKEN = 4

_COMMON = ("model", "add_special_tokens")
_CHAT = (
    *("model", "messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "chat_template_kwargs", "add_special_tokens", "documents"),
)


class Body(msgspec.Struct, frozen=True):
    """The fields that are read; all others are left to the worker."""

    model: Annotated[str, msgspec.Meta(max_length=MODEL_CHARS_MAX)] = ""
    prompt: str | list[str | int | list[int]] | None = None
    messages: list[dict[str, msgspec.Raw]] | None = None
    prompt_embeds: msgspec.Raw | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. ``tokens`` when it names them itself; ``tokenize`` is what to ask a worker for them
    otherwise, empty when that would not say what its KV depends on. ``about``: about how many they are."""

    model: str
    session: str
    beginning: str
    stream: bool
    tokens: list[int] | None
    tokenize: bytes
    about: int


def read_prompt(raw: bytes, path: str, session: str) -> Prompt:
    """``session``: what the header says. RAISES BadInput for what is no such request."""
    try:
        body = msgspec.json.decode(raw, type=Body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(str(error)[:200]) from error
    chat = path.endswith("/chat/completions")
    if chat and body.messages is None:
        raise _bad("it has no messages")
    if not chat and body.prompt is None and body.prompt_embeds is None:
        raise _bad("it has no prompt")
    tokens, text = _chat(body) if chat else _completion(body)
    plain = _is_plain(body) and (not chat or _is_text(body))
    if tokens is not None and (not plain or not 0 < len(tokens) <= PROMPT_TOKENS_MAX):
        text, tokens = str(tokens[:BEGINNING_CHARS]), None
    return Prompt(
        model=body.model,
        session=(session or body.prompt_cache_key or body.user or "")[:SESSION_CHARS_MAX],
        beginning=_digest((body.cache_salt or "") + text[:BEGINNING_CHARS]) if text else "",
        stream=bool(body.stream),
        tokens=tokens,
        tokenize=_to_tokenize(raw, chat, text) if plain and tokens is None and text else b"",
        about=len(tokens) if tokens is not None else len(text) // CHARS_A_TOKEN + 1,
    )


def _completion(body: Body) -> tuple[list[int] | None, str]:
    """All of a request's prompts go to one worker: the first one speaks for them."""
    prompt = body.prompt or []
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if isinstance(first, str):
        return None, first
    tokens = first if isinstance(first, list) else [each for each in prompt if isinstance(each, int)]
    whole = [each for each in tokens if isinstance(each, int) and 0 <= each < 1 << 32]
    return (whole, "") if len(whole) == len(tokens) else (None, str(tokens[:99]))


def _chat(body: Body) -> tuple[list[int] | None, str]:
    """All messages joined, for their length and how they begin."""
    assert body.messages is not None
    return None, "\n".join(
        str(value, "utf-8", "replace") for each in body.messages for value in each.values()
    )


def _is_plain(body: Body) -> bool:
    return body.cache_salt is None and body.prompt_embeds is None and body.truncate_prompt_tokens is None


def _is_text(body: Body) -> bool:
    """No message has a part that is not text."""
    return not any(_has_other_part(each.get("content")) for each in body.messages or [])


def _has_other_part(content: msgspec.Raw | None) -> bool:
    if content is None or not bytes(content).lstrip().startswith(b"["):
        return False
    try:
        parts = msgspec.json.decode(content, type=list[dict[str, msgspec.Raw]])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True
    return any(bytes(part.get("type", b"")) != b'"text"' for part in parts)


def _to_tokenize(raw: bytes, chat: bool, text: str) -> bytes:
    """The body for a worker's ``/tokenize``: what the prompt's tokens depend on, and nothing else."""
    whole = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    asked = {name: whole[name] for name in (_CHAT if chat else _COMMON) if name in whole}
    if not chat:
        asked["prompt"] = msgspec.Raw(msgspec.json.encode(text))
    return msgspec.json.encode(asked)


def _digest(text: str) -> str:
    return "text:" + blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _bad(why: str) -> BadInput:
    return BadInput("bad_message", "a body that is no request for a completion", why, "see docs/routing.md")
