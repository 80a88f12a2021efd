"""What a prompt's blocks are called, and how many of them."""

from __future__ import annotations

from array import array

from kvcache.credentials import Credentials
from kvcache.packing import PREFIX_BLOCKS_MAX
from kvcache.routing.names import Scheme, queries
from kvcache.sequence import sequence_hashes

KEY = Credentials.default().tenant_key


def test_no_more_blocks_are_named_than_one_question_may_ask_about() -> None:
    """The first ones: what is asked is how long the leading run is."""
    tokens = array("I", range(PREFIX_BLOCKS_MAX + 9)).tobytes()
    [query] = queries(tokens, {Scheme("", b"", 1): frozenset()}, KEY)
    assert query.hints == bytes(sequence_hashes(tokens, 1))[: 8 * PREFIX_BLOCKS_MAX]
    [query] = queries(tokens, {Scheme("", b"", 2): frozenset()}, KEY)
    assert len(query.hints) == 8 * ((PREFIX_BLOCKS_MAX + 9) // 2)
