"""The fingerprint: every field counts, is named when it differs, and no two fingerprints encode alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from hashlib import blake2b

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcache.block import BlockSpec
from kvcache.errors import BadInput
from kvcache.namespace import NUMBER_MAX, TEXT_CHARS_MAX, Namespace, shape_of
from tests.kvcache.elsewhere import printed_elsewhere

KEY = bytes(range(32))
WHOLE = Namespace(
    model="org/model",
    weights="0123456789abcdef",
    epoch=3,
    adapter="lora@2",
    rope="r",
    dtype="bfloat16",
    scales="in the payload",
    layout="canonical",
    isa="amx",
    layer_first=4,
    layer_count=8,
    group=1,
    block_tokens=16,
    shape="16x8x4096",
    tp_rank=1,
    tp_size=3,
    pp_rank=2,
    pp_size=4,
    cp_rank=0,
    cp_size=3,
    codec="raw",
    tenant="team-a",
)
# What storage keys begin with, and where chains start: a change here orphans all that was ever stored.
GOLDEN_ID = "f517561dab6499be70400f16e379c09a"
GOLDEN_ROOT = "28910aefc3213b56d0b11bf66e800525"

# One other value for each field, as near to the first as it can be.
OTHER: dict[str, str | int] = {
    "model": "org/Model",
    "weights": "0123456789abcdee",
    "epoch": 4,
    "adapter": "lora@3",
    "rope": "",
    "dtype": "float16",
    "scales": "",
    "layout": "canonical ",
    "isa": "",
    "layer_first": 5,
    "layer_count": 9,
    "group": 0,
    "block_tokens": 32,
    "shape": "16x4x8192",
    "tp_rank": 0,
    "tp_size": 2,
    "pp_rank": 1,
    "pp_size": 3,
    "cp_rank": 1,
    "cp_size": 1,
    "codec": "zstd",
    "tenant": "team-b",
}
IN_THE_ROOT = {"model", "weights", "epoch", "adapter", "block_tokens"}
NAMES = [field.name for field in fields(Namespace)]

texts = st.text(st.characters(categories=("L", "N", "P")), max_size=8)
numbers = st.integers(0, 1 << 40)


@st.composite
def namespaces(draw: st.DrawFn) -> Namespace:
    values: dict[str, str | int] = {}
    for name, example in WHOLE.to_map().items():
        values[name] = draw(texts) if isinstance(example, str) else draw(numbers)
    for name in ("model", "weights", "dtype", "layout", "shape", "codec"):
        values[name] = f"{values[name]}x"
    for kind in ("tp", "pp", "cp"):
        values[f"{kind}_size"] = int(values[f"{kind}_rank"]) + int(values[f"{kind}_size"]) + 1
    values["block_tokens"] = int(values["block_tokens"]) + 1
    return Namespace.from_map(values)


def changed(name: str) -> Namespace:
    return Namespace.from_map({**WHOLE.to_map(), name: OTHER[name]})


def refused(values: dict[str, str | int]) -> str:
    with pytest.raises(BadInput) as caught:
        Namespace.from_map(values)
    assert caught.value.code == "namespace_differs"
    assert caught.value.todo
    return str(caught.value)


class TestGoldenVectors:
    def test_the_id(self) -> None:
        assert WHOLE.namespace_id().hex() == GOLDEN_ID

    def test_the_root(self) -> None:
        assert WHOLE.root(KEY).hex() == GOLDEN_ROOT

    def test_both_spelled_out(self) -> None:
        def encoded(names: Iterable[str]) -> bytes:
            parts = b""
            for name in names:
                value = getattr(WHOLE, name)
                tagged = ("i" if isinstance(value, int) else "s") + str(value)
                for text in (name, tagged):
                    parts += len(text).to_bytes(4, "little") + text.encode()
            return parts

        made = blake2b(encoded(NAMES), digest_size=16, person=b"kvcache.space.1")
        assert made.hexdigest() == GOLDEN_ID
        in_order = ["model", "weights", "epoch", "adapter", "block_tokens"]
        made = blake2b(encoded(in_order), digest_size=16, key=KEY, person=b"kvcache.root.1")
        assert made.hexdigest() == GOLDEN_ROOT

    def test_the_same_in_processes_with_other_hash_seeds(self) -> None:
        program = (
            "from kvcache.namespace import Namespace\n"
            f"namespace = Namespace.from_map({WHOLE.to_map()!r})\n"
            f"print(namespace.namespace_id().hex(), namespace.root({KEY!r}).hex())\n"
        )
        assert printed_elsewhere(program) == [[GOLDEN_ID, GOLDEN_ROOT]] * 2


class TestEveryField:
    def test_is_in_the_matrix(self) -> None:
        assert set(NAMES) == set(OTHER)

    @pytest.mark.parametrize("name", NAMES)
    def test_alone_changes_the_id(self, name: str) -> None:
        assert changed(name).namespace_id() != WHOLE.namespace_id()

    def test_changes_the_id_in_its_own_way(self) -> None:
        assert len({changed(name).namespace_id() for name in NAMES}) == len(NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_is_named_in_the_refusal_both_ways(self, name: str) -> None:
        for yours, stored in ((changed(name), WHOLE), (WHOLE, changed(name))):
            with pytest.raises(BadInput) as caught:
                yours.check_same(stored)
            assert caught.value.code == "namespace_differs"
            assert caught.value.what.startswith(f"{name}: stored ")

    @pytest.mark.parametrize("name", NAMES)
    def test_changes_the_root_only_when_it_is_an_input_of_it(self, name: str) -> None:
        assert (changed(name).root(KEY) != WHOLE.root(KEY)) == (name in IN_THE_ROOT)

    @pytest.mark.parametrize("name", NAMES)
    def test_is_required_in_a_map(self, name: str) -> None:
        values = WHOLE.to_map()
        del values[name]
        assert name in refused(values)

    @pytest.mark.parametrize("name", NAMES)
    def test_has_one_type(self, name: str) -> None:
        wrongs: list[object] = [None, True, 1.0, b"x", [], str(1) if isinstance(OTHER[name], int) else 1]
        for wrong in wrongs:
            assert name in refused({**WHOLE.to_map(), name: wrong})  # type: ignore[dict-item]  # wrong on purpose

    @pytest.mark.parametrize("name", NAMES)
    def test_has_a_range(self, name: str) -> None:
        for wrong in (-1, NUMBER_MAX + 1, 10**5_000):
            if isinstance(OTHER[name], int):
                assert name in refused({**WHOLE.to_map(), name: wrong})
        for text in ("x" * (TEXT_CHARS_MAX + 1), "a\nb", "a\x00", "\ud800", "\x1b[2J"):
            if isinstance(OTHER[name], str):
                said = refused({**WHOLE.to_map(), name: text})
                assert name in said
                assert said.isprintable()


class TestEncoding:
    @pytest.mark.slow
    @given(namespaces())
    def test_a_map_is_read_back(self, namespace: Namespace) -> None:
        assert Namespace.from_map(namespace.to_map()) == namespace

    @pytest.mark.slow
    @given(namespaces(), namespaces())
    def test_injective(self, one: Namespace, other: Namespace) -> None:
        same = one == other
        assert (one.namespace_id() == other.namespace_id()) == same
        assert (one.differences(other) == []) == same

    @pytest.mark.slow
    @given(namespaces(), st.sampled_from(NAMES), st.sampled_from(NAMES))
    def test_swapping_the_values_of_two_fields_changes_the_id(
        self, namespace: Namespace, one: str, other: str
    ) -> None:
        values = namespace.to_map()
        assume(values[one] != values[other])
        values[one], values[other] = values[other], values[one]
        try:
            swapped = Namespace.from_map(values)
        except BadInput:
            return
        assert swapped.namespace_id() != namespace.namespace_id()

    def test_moving_a_boundary_between_fields_changes_id_and_root(self) -> None:
        one = replace(WHOLE, model="ab", weights="c")
        other = replace(WHOLE, model="a", weights="bc")
        assert one.namespace_id() != other.namespace_id()
        assert one.root(KEY) != other.root(KEY)

    def test_a_number_is_not_its_digits(self) -> None:
        """An adapter called 3 with epoch 0 is not epoch 3 without one."""
        assert replace(WHOLE, adapter="3", epoch=0).root(KEY) != replace(WHOLE, adapter="0", epoch=3).root(
            KEY
        )

    def test_the_order_of_a_map_does_not_count(self) -> None:
        turned = dict(reversed(WHOLE.to_map().items()))
        assert Namespace.from_map(turned).namespace_id() == WHOLE.namespace_id()

    def test_id_and_root_are_unlike(self) -> None:
        assert bytes(WHOLE.namespace_id()) != bytes(WHOLE.root(KEY))


class TestRoot:
    def test_the_tenants_key_counts(self) -> None:
        assert WHOLE.root(KEY) != WHOLE.root(KEY[::-1])

    @pytest.mark.parametrize("length", [0, 16, 31, 33, 64, 65])
    def test_a_key_of_another_length_is_refused(self, length: int) -> None:
        with pytest.raises(BadInput):
            WHOLE.root(bytes(length))


class TestRefusals:
    def test_the_same_is_not_refused(self) -> None:
        WHOLE.check_same(Namespace.from_map(WHOLE.to_map()))
        assert WHOLE.differences(WHOLE) == []

    def test_a_difference_shows_both_values(self) -> None:
        other = replace(WHOLE, dtype="float32", isa="")
        assert other.differences(WHOLE) == [
            "dtype: stored bfloat16, yours float32",
            "isa: stored amx, yours (empty)",
        ]

    def test_an_unknown_field_is_named_with_what_was_meant(self) -> None:
        said = refused({**WHOLE.to_map(), "tp_ranks": 1})
        assert "'tp_ranks'" in said
        assert "did you mean 'tp_rank'?" in said

    def test_all_missing_fields_are_named_at_once(self) -> None:
        said = refused({"model": "m"})
        assert all(name in said for name in NAMES if name != "model")

    @pytest.mark.parametrize("name", ["model", "weights", "dtype", "layout", "shape", "codec"])
    def test_what_identifies_may_not_be_empty(self, name: str) -> None:
        assert name in refused({**WHOLE.to_map(), name: ""})

    @pytest.mark.parametrize("kind", ["tp", "pp", "cp"])
    def test_a_rank_is_below_its_size(self, kind: str) -> None:
        for rank, size in ((1, 1), (0, 0), (4, 3)):
            said = refused({**WHOLE.to_map(), f"{kind}_rank": rank, f"{kind}_size": size})
            assert f"{kind}_rank" in said

    def test_a_block_has_tokens(self) -> None:
        assert "block_tokens" in refused({**WHOLE.to_map(), "block_tokens": 0})


class TestShape:
    SPEC = BlockSpec(block_tokens=16, plane_count=16, head_count=8, head_bytes=4_096)

    def test_a_spec_that_fits(self) -> None:
        assert shape_of(self.SPEC) == WHOLE.shape
        WHOLE.check_shape(self.SPEC)

    @pytest.mark.parametrize("name", ["block_tokens", "plane_count", "head_count", "head_bytes"])
    def test_a_spec_that_does_not(self, name: str) -> None:
        doubled = replace(self.SPEC, **{name: getattr(self.SPEC, name) * 2})
        with pytest.raises(BadInput) as caught:
            WHOLE.check_shape(doubled)
        assert caught.value.code == "namespace_differs"
        assert WHOLE.shape in str(caught.value)

    def test_equal_bytes_of_another_shape_do_not_fit(self) -> None:
        with pytest.raises(BadInput):
            WHOLE.check_shape(replace(self.SPEC, plane_count=8, head_count=16))
