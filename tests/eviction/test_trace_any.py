"""Whatever trace there is, everything that can be done with it is done, and what comes out is sound."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given, settings

from kvcache.errors import BadInput
from kvcache.eviction.commands.trace import trace as command
from kvcache.eviction.traces.edit import anonymized, coarsened, renumbered, split_by_session, split_by_time
from kvcache.eviction.traces.files import WRITABLE, Reading, open_trace, save_trace
from kvcache.eviction.traces.generate_like import fit, generate_like
from kvcache.eviction.traces.shape import picture, shape_of, uses_of
from kvcache.eviction.traces.trace import Trace, write_trace
from tests.eviction.test_trace import traces


@given(trace=traces())
@settings(max_examples=120)
@pytest.mark.slow
def test_it_has_a_shape(trace: Trace) -> None:
    if trace.request_count:
        shape = shape_of(trace)
        assert 0 <= shape.ideal_token_hit <= 1
        assert 0 <= shape.ideal_block_hit <= 1
        assert shape.unique_blocks == renumbered(trace).block_count
        assert picture("any", shape)


@given(trace=traces())
@settings(max_examples=120)
@pytest.mark.slow
def test_it_can_be_edited(trace: Trace) -> None:
    known = list(uses_of(trace).known_blocks)
    for same in (anonymized(trace), renumbered(trace), coarsened(trace, trace.block_tokens)):
        assert list(uses_of(same).known_blocks) == known
    larger = coarsened(trace, 2 * trace.block_tokens)
    assert [request.prompt_tokens for request in larger.requests()] == [
        request.prompt_tokens for request in trace.requests()
    ]
    for split in (split_by_time, split_by_session):
        if trace.request_count:
            try:
                one, other = split(trace, 0.5)
            except BadInput as error:
                assert "one part has no request" in str(error)
            else:
                assert one.request_count + other.request_count == trace.request_count


@given(trace=traces())
@settings(max_examples=120)
@pytest.mark.slow
def test_it_can_be_made_up_again(trace: Trace) -> None:
    if trace.request_count:
        other = generate_like(fit(trace), 2 * trace.request_count)
        assert other.request_count == 2 * trace.request_count
        assert other.block_tokens == trace.block_tokens


@given(trace=traces())
@settings(max_examples=60)
@pytest.mark.slow
def test_it_can_be_written_in_every_format(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    folder = tmp_path_factory.mktemp("any")
    for form in WRITABLE:
        path = folder / form
        save_trace(path, trace, form)
        if trace.request_count:
            read = open_trace(path, Reading(block_tokens=trace.block_tokens))
            assert read.request_count == trace.request_count
            assert list(uses_of(read).block_counts) == list(uses_of(trace).block_counts)
            assert list(uses_of(read).known_blocks) == list(uses_of(trace).known_blocks)


@given(trace=traces())
@settings(max_examples=25)
@pytest.mark.slow
def test_the_command_ends_with_a_word(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("any") / "t.npz"
    write_trace(path, trace)
    for words in (["info", str(path)], ["info", str(path), "--json"], ["anonymize", str(path), str(path)]):
        done = CliRunner().invoke(command, words, standalone_mode=False)
        assert done.exception is None or isinstance(done.exception, BadInput)
        assert done.output or done.exception
