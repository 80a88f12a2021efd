"""Any message of the wire, and the plainest one of each kind: what tests of the codec send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from kvcache import wire

REQUESTS: tuple[type[wire.Message], ...] = get_args(wire.Request)
REPLIES: tuple[type[wire.Message], ...] = get_args(wire.Reply)
MESSAGES = REQUESTS + REPLIES
NUMBER_MAX = (1 << 64) - 1

Plain: TypeAlias = "dict[str, object]"
Decode = Callable[[bytes | memoryview], tuple[int, wire.Message]]
Struct = TypeVar("Struct", bound=msgspec.Struct)
printable = st.text(max_size=12)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), NUMBER_MAX)
    | st.floats()
    | printable
    | st.binary(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(printable | st.binary(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def values_of(hint: object) -> st.SearchStrategy[object]:
    """What a field of this type may hold."""
    if hint not in (wire.Unsigned, wire.OrNone) and get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if hint == wire.Unsigned:
        return st.integers(0, NUMBER_MAX)
    if hint == wire.OrNone:
        return st.integers(-1, NUMBER_MAX)
    if get_origin(hint) is list:
        return st.lists(values_of(get_args(hint)[0]), max_size=3)
    if get_origin(hint) is dict:
        return st.dictionaries(printable, values_of(get_args(hint)[1]), max_size=3)
    if get_args(hint):
        return st.one_of([values_of(arm) for arm in get_args(hint)])
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return messages_of(hint)
    plain: dict[object, st.SearchStrategy[object]] = {
        bool: st.booleans(),
        bytes: st.binary(max_size=48),
        float: st.floats(allow_nan=False),
        int: st.integers(-(1 << 63), NUMBER_MAX),
        str: printable,
    }
    return plain[hint]


def messages_of(kind: type[Struct]) -> st.SearchStrategy[Struct]:
    hints = get_type_hints(kind, include_extras=True)
    fields = {name: values_of(hints[name]) for name in kind.__struct_fields__}
    return st.builds(kind, **fields)


def example(kind: type[Struct]) -> Struct:
    """The plainest message of its kind, the same each time."""
    empty: dict[object, object] = {bool: True, bytes: b"b", float: 1.5, int: 1, str: "s"}
    values: dict[str, object] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if name in kind.__struct_fields__:
            if get_origin(hint) is Annotated and get_args(hint)[0] is not int:
                hint = get_args(hint)[0]
            container = get_origin(hint) if get_origin(hint) in (list, dict) else None
            if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
                values[name] = example(hint)
            else:
                values[name] = container() if container else empty.get(hint, 1)
    return kind(**values)


def plain_of(kind: type[wire.Message]) -> Plain:
    plain = msgspec.to_builtins(example(kind), builtin_types=(bytes,))
    assert isinstance(plain, dict)
    return plain


def decoder(kind: type[wire.Message]) -> Decode:
    return wire.decode_request if kind in REQUESTS else wire.decode_reply


def body_of(call: int, message: wire.Message) -> bytes:
    return wire.encode(call, message)[wire.HEADER.size :]
