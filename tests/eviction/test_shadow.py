"""Miniature caches: they hold what the policy says, by name, and find what a whole cache finds, about."""

from __future__ import annotations

from hashlib import blake2b
from random import Random

import pytest

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.registry import POLICIES, policy_class
from kvcache.eviction.shadow import ShadowCache
from kvcache.eviction.shadow_words import Situation, advice
from kvcache.eviction.shadows import CACHES_MAX, SAMPLE_MIN, SLOT_NS, Cell, Shadows
from kvcache.policy import RequestContext

LRU, HAZARD = Choice("leaf-lru"), Choice("leaf-hazard")


def names(text: str) -> tuple[StorageKey, ...]:
    """Of "abc": three blocks, each behind the one before it."""
    ends = range(1, len(text) + 1)
    return tuple(StorageKey(bytes(8) + blake2b(text[:end].encode(), digest_size=8).digest()) for end in ends)


def context(now_s: int = 1) -> RequestContext:
    return RequestContext(now_ns=now_s * NS_PER_S)


class TestCache:
    def cache(self, blocks: int, policy: str = "leaf-lru") -> ShadowCache:
        return ShadowCache(policy_class(policy), 10 * blocks)

    def request(self, cache: ShadowCache, text: str) -> int:
        path = names(text)
        found = cache.asked(context(), path)
        cache.stored(context(), path[found - 1] if found else None, path[found:], 10)
        cache.check()
        return found

    def test_it_finds_what_it_holds(self) -> None:
        cache = self.cache(4)
        assert self.request(cache, "abc") == 0
        assert self.request(cache, "abd") == 2
        assert (len(cache), cache.is_full) == (4, False)
        assert self.request(cache, "ab") == 2
        assert self.request(cache, "x") == 0
        assert cache.is_full
        assert [cache.asked(context(), names(text)) for text in ("abc", "abd", "x")] == [2, 3, 1]

    def test_what_stands_behind_nothing_is_not_stored(self) -> None:
        cache = self.cache(4)
        cache.stored(context(), names("ab")[-1], names("abc")[2:], 10)
        assert len(cache) == 0

    def test_what_is_stored_again_is_held_once(self) -> None:
        cache = self.cache(4)
        for _ in range(3):
            cache.stored(context(), None, names("abc"), 10)
        assert (len(cache), cache.used_bytes) == (3, 30)

    def test_a_prompt_longer_than_the_cache_is_kept_from_its_beginning(self) -> None:
        cache = self.cache(3)
        self.request(cache, "abcdef")
        assert cache.asked(context(), names("abcdef")) == 3
        self.request(cache, "x" * 9)
        assert (len(cache), cache.asked(context(), names("x" * 9))) == (3, 3)

    def test_blocks_of_different_sizes(self) -> None:
        cache = self.cache(10)
        cache.stored(context(), None, names("a"), 70)
        cache.stored(context(), None, names("b"), 40)
        assert (len(cache), cache.used_bytes) == (1, 40)
        cache.stored(context(), None, names("c"), 1_000)
        assert cache.used_bytes <= 100

    @pytest.mark.parametrize("seed", range(8))
    def test_whatever_it_is_told(self, seed: int) -> None:
        """Paths whose blocks stand behind others than before, or behind nothing: what is known of a prompt is
        not always known from its beginning."""
        random, cache = Random(seed), self.cache(12)
        known = names("abcdefghijklmnop")
        for _ in range(400):
            path = random.choices(known, k=random.randint(1, 6))
            before = random.choice((None, *known))
            if random.random() < 0.5:
                assert cache.asked(context(), path) <= len(path)
            else:
                cache.stored(context(), before, path, random.choice((10, 10, 25)))
            cache.check()

    @pytest.mark.parametrize("policy", [*POLICIES, "leaf-hazard+keep"])
    def test_any_policy(self, policy: str) -> None:
        random, cache = Random(1), self.cache(20, policy)
        for _ in range(300):
            self.request(cache, "".join(random.choice("abc") for _ in range(random.randint(1, 8))))
        assert cache.fault == ""

    def test_a_policy_that_fails_is_replaced_and_it_is_said(self) -> None:
        class Broken(LeafLru):
            def victims(self, context: RequestContext, count: int) -> list[int]:
                raise RuntimeError("cannot")

        cache = ShadowCache(Broken, 30)
        self.request(cache, "abc")
        self.request(cache, "xyz")
        assert "cannot" in cache.fault


def ask(shadows: Shadows, text: str, held: int, tokens: int = 1) -> None:
    """A look-up of which everything is in the sample."""
    path = names(text)
    shadows.counted(len(path) * tokens, held * tokens)
    shadows.asked(context(), None, path, held, 10, tokens)
    shadows.stored(context(), path[held - 1] if held else None, path[held:], 10)


def of_two(sample: float = 1.0) -> Shadows:
    made = Shadows([Cell(LRU, 1.0), Cell(LRU, 0.5)], round(40 / sample), sample)
    made.tick(1, 0, False)
    return made


class TestShadows:
    def test_each_size_finds_its_own(self) -> None:
        shadows = of_two()
        for text in ("abcd", "abcd", "abcd"):
            ask(shadows, text, 4 if shadows.asked_tokens else 0)
        whole, half = shadows.estimates(0)
        assert (whole.hit_ratio, half.hit_ratio) == pytest.approx((8 / 12, 4 / 12))
        assert half.gain == pytest.approx(-4 / 12)
        assert (whole.is_full, half.is_full) == (False, False)
        assert shadows.found_ratio == 8 / 12

    def test_what_the_sample_is_wrong_by_is_taken_off(self) -> None:
        shadows = of_two()
        for _ in range(4):
            ask(shadows, "abcd", 4)  # The store held it before the shadows were there.
        whole, half = shadows.estimates(0)
        assert shadows.found_ratio == 1.0
        assert (whole.sampled_ratio, whole.hit_ratio) == (12 / 16, 1.0)
        assert (half.sampled_ratio, half.hit_ratio) == (6 / 16, 10 / 16)
        assert [each.hit_ratio for each in shadows.estimates(None)] == [12 / 16, 6 / 16]

    def test_of_what_was_asked_most_is_not_in_the_sample(self) -> None:
        shadows = of_two(0.25)
        shadows.counted(100, 50)
        shadows.asked(context(), None, names("abcd"), 0, 10, 4)
        whole, _ = shadows.estimates(0)
        assert whole.sampled_ratio == pytest.approx(1 - 16 / 0.25 / 100)
        assert whole.blocks == 4

    def test_old_times_are_forgotten(self) -> None:
        shadows = of_two()
        ask(shadows, "abcd", 0)
        for slot in range(1, 13):
            shadows.tick(1 + slot * SLOT_NS, 0, False)
            ask(shadows, "abcd", 4)
        assert shadows.found_ratio == 1.0
        assert shadows.estimates(0)[0].sampled_ratio == 1.0
        assert shadows.seconds(1 + 12 * SLOT_NS) == 11 * SLOT_NS / NS_PER_S

    def test_nothing_counts_before_a_full_store_has_a_full_stand_in(self) -> None:
        shadows = Shadows([Cell(LRU, 1.0)], 40, 1.0)
        shadows.tick(1, 0, True)
        ask(shadows, "abcd", 0)
        assert (shadows.is_counting, shadows.estimates(0)) == (False, [])
        ask(shadows, "xyz", 0)
        shadows.tick(2, 0, True)
        assert shadows.is_counting
        ask(shadows, "xyz", 3)
        assert [each.hit_ratio for each in shadows.estimates(0)] == [1.0]

    def test_how_large_the_sample_is_is_seen_by_what_the_store_misses(self) -> None:
        """It should be a half of the blocks, and happens to be a quarter of those that are asked for."""
        shadows = Shadows([Cell(LRU, 1.0)], 1 << 20, 0.5)
        shadows.tick(1, None, False)
        for at in range(600):
            shadows.counted(4, 0)
            shadows.asked(context(), None, names(f"{at}|")[-1:], 0, 10, 1)
        assert [each.hit_ratio for each in shadows.estimates(None)] == [0.0]

    def test_a_thinner_sample_begins_anew(self) -> None:
        shadows = of_two()
        ask(shadows, "abcd", 0)
        assert shadows.thin()
        assert (shadows.sample, shadows.block_count, shadows.asked_tokens) == (0.5, 0, 0)
        while shadows.thin():
            pass
        assert SAMPLE_MIN <= shadows.sample < 2 * SAMPLE_MIN

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(5))
    def test_a_sample_says_about_what_all_say_and_how_sure_that_is(self, seed: int) -> None:
        cells = [Cell(LRU, 1.0), Cell(LRU, 0.5), Cell(HAZARD, 1.0)]
        whole, quarter = Shadows(cells, 6_000, 1.0), Shadows(cells, 6_000, 0.25)
        random = Random(seed)
        for shadows in (whole, quarter):
            shadows.tick(1, 0, False)
        for turn in range(12_000):
            path = names(chr(200 + int(random.paretovariate(0.5)) % 3_000))
            held = whole._caches[0].asked(context(turn), path)  # As the store would.
            for shadows in (whole, quarter):
                shadows.counted(1, held)
            for shadows in (whole, quarter)[: 2 if path[0][15] < 64 else 1]:
                shadows.asked(context(turn), None, path, held, 10, 1)
                shadows.stored(context(turn), None, path, 10)
        for exact, guess in zip(whole.estimates(0), quarter.estimates(0), strict=True):
            assert abs(guess.hit_ratio - exact.hit_ratio) <= max(0.01, 1.5 * guess.doubt)
            assert guess.doubt < 0.1
        assert quarter.block_count < whole.block_count / 3

    def test_too_many_are_refused(self) -> None:
        with pytest.raises(BadInput, match="shadow caches"):
            Shadows([Cell(LRU, 1 + number) for number in range(CACHES_MAX + 1)], 100, 1.0)


def situation(shadows: Shadows, own: int | None, seconds: float = 3_600) -> Situation:
    found = shadows.estimates(own)
    return Situation(
        "leaf-lru", shadows.found_ratio, seconds, shadows.sample, found, own, shadows.is_counting
    )


class TestAdvice:
    def busy(self) -> Shadows:
        """Prompts that come twice, at once, among a few that come again and again, later."""
        shadows = Shadows([Cell(LRU, 1.0), Cell(LRU, 2.0), Cell(HAZARD, 1.0)], 600, 1.0)
        shadows.tick(1, 0, False)
        for turn in range(1_200):
            ask(shadows, f"{turn % 70:c<3}!", 0)
        return shadows

    def test_more_memory_is_worth_it_where_it_is(self) -> None:
        said = advice(situation(self.busy(), 0))
        assert any("With 200% of the memory, leaf-lru would have found" in line for line in said)
        assert any("points more" in line for line in said)

    def test_it_says_when_it_knows_too_little(self) -> None:
        shadows = of_two()
        ask(shadows, "abcd", 0)
        assert "too little" in advice(situation(shadows, 0))[-1]
        assert "too little" in advice(situation(self.busy(), 0, seconds=60))[-1]
        assert "filling" in advice(situation(Shadows([Cell(LRU, 1.0)], 40, 1.0), 0))[0]
        assert "no shadow of its own" in advice(situation(self.busy(), None))[-1]
