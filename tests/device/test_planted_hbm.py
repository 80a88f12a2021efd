"""Bugs put into the HBM tier of the node and of the client: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

STORE = "tests/device/test_hbm_store.py"
LEAVING = "tests/device/test_hbm_leaving.py"
GPUS = "tests/device/test_hbm_gpus.py"
MAKING = "tests/device/test_hbm_making.py"
ENGINE = "tests/device/test_engine_hangs.py"
TUNING = "tests/device/test_hbm_tuning.py"
HANGS = "tests/device/test_hbm_hangs.py"
CLIENT = "tests/client/test_hbm_operations.py"
SAVING = "tests/client/test_hbm_saving.py"
BESIDE = "tests/device/test_saving.py"
LAYERED = "tests/device/test_hbm_layered.py"
PLANNING = "tests/device/test_hbm_planning.py"
VLLM = "tests/client/connectors/test_vllm_hbm.py"
PAGES = "tests/device/test_vllm_pages.py"

PLANTS = (
    Plant(
        "an engine goes on with a GPU that failed",
        "kvcache/device/line.py",
        "                self._owner.lose(failure.why)\n",
        "                pass\n",
        f"{ENGINE}::test_one_that_failed_is_lost",
    ),
    Plant(
        "slots of a save that hangs are given back",
        "kvcache/device/saving.py",
        "            if not self._is_over:\n                raise silent()\n",
        "",
        f"{ENGINE}::test_a_save_that_hangs_keeps_its_slots",
    ),
    Plant(
        "an engine says that copies have ended which hang",
        "client/link.py",
        "again and not (self.device is not None and self.device.is_stuck)",
        "again",
        f"{ENGINE}::test_what_it_may_still_write_to_is_not_said_to_be_free",
    ),
    Plant(
        "a policy changes on one GPU only",
        "server/tuning.py",
        "            while not all(policy.change_step(STEP_BLOCKS) for policy in tier.policies):\n",
        "            while not tier.policies[0].change_step(STEP_BLOCKS):\n",
        f"{TUNING}::test_it_changes_on_every_gpu_and_nothing_is_lost",
    ),
    Plant(
        "HBM and host memory have different bytes under one name",
        "server/core.py",
        "                self.hbm.overrule(change.keys, self.ledger)\n",
        "                pass\n",
        f"{LEAVING}::test_host_memory_overrules_hbm",
        waits=True,
    ),
    Plant(
        "what was copied out of HBM is not verified",
        "kvcache/tiers/hbm_demote.py",
        "            if block_checksum(key, size, chunk_bytes, sums[at]) != checksum:\n",
        "            if False:\n",
        f"{LEAVING}::test_wrong_bytes_never_go_below",
    ),
    Plant(
        "published below although the GPU failed",
        "kvcache/tiers/hbm_demote.py",
        "        arrived: list[bytes] = []\n",
        "        arrived = [b''] * len(part.reservation.keys)\n",
        f"{LEAVING}::test_a_gpu_that_fails_while_it_is_copied_from",
    ),
    Plant(
        "what is copied out of HBM is held to no rate",
        "kvcache/tiers/hbm_demote.py",
        "            self._cap.spend(size * len(part.reservation.keys))\n",
        "            pass\n",
        f"{LEAVING}::test_it_is_held_to_its_rate",
    ),
    Plant(
        "nothing is saved before it leaves",
        "kvcache/tiers/hbm_demote.py",
        "        return [key for key in coldest if not self._below.has(key)]\n",
        "        return []\n",
        f"{LEAVING}::test_it_goes_to_host_memory_first",
        waits=True,
    ),
    Plant(
        "a block that a reader reported stays",
        "server/hbm_asking.py",
        "                gone = arena.ledger.quarantine(lease.keys[at], lease.generations[at], now_ns)\n",
        "                gone = now_ns > 0\n",
        f"{STORE}::TestWhatGoesWrong::test_a_flipped_byte_is_had_from_below",
    ),
    Plant(
        "other bytes than below are taken",
        "server/hbm.py",
        "        if list(held.checksums) != list(checksums[: len(held.keys)]):\n",
        "        if False:\n",
        f"{STORE}::TestWhatGoesWrong::test_other_bytes_than_below_are_refused",
    ),
    Plant(
        "slots of a vanished writer used again at once",
        "server/hbm.py",
        "            kept += arena.ledger.disconnect(owner, writes_ended=False)\n",
        "            kept += arena.ledger.disconnect(owner, writes_ended=True)\n",
        f"{STORE}::TestWhoGetsWhat::test_slots_of_a_writer_that_is_gone_wait_for_its_copies",
        waits=True,
    ),
    Plant(
        "slots of a vanished writer never used again",
        "server/core.py",
        "            self.hbm.writes_ended(owner)\n",
        "            pass\n",
        f"{STORE}::TestWhoGetsWhat::test_slots_of_a_writer_that_is_gone_wait_for_its_copies",
        waits=True,
    ),
    Plant(
        "any trust domain is given the slab",
        "kvcache/tiers/hbm_arena.py",
        "        return self.memory.on(gpu, name) is not None\n",
        "        return self.memory.on(gpu, self.name) is not None\n",
        f"{STORE}::TestWhoGetsWhat::test_another_tenants_engine_gets_none",
    ),
    Plant(
        "a lost GPU is given to engines still",
        "kvcache/tiers/hbm_arena.py",
        "            self.ledger.withdraw_arena(ARENA, now_ns)\n",
        "",
        f"{STORE}::TestWhatGoesWrong::test_a_gpu_that_the_node_lost",
    ),
    Plant(
        "what stands behind HBM is brought without what is before it",
        "server/reading.py",
        "        is_joined = hot == 0 or hot == len(keys) or self._core.ledger.has(keys[hot - 1])\n",
        "        is_joined = True\n",
        f"{STORE}::TestThereAndBack::test_the_rest_comes_from_nvme",
    ),
    Plant(
        "what one replica's GPU has is told of all",
        "server/hbm_telling.py",
        "        return bool(numbers) and all(",
        "        return bool(numbers) and any(",
        f"{GPUS}::test_followers_are_told_of_what_every_replica_has",
    ),
    Plant(
        "a replica that comes is taken to have what was told",
        "server/hbm_telling.py",
        "            self._widened.add(namespace)\n",
        "            pass\n",
        f"{GPUS}::test_a_replica_that_comes_has_none_of_what_was_told",
    ),
    Plant(
        "a GPU counts for blocks of another rank",
        "server/hbm_telling.py",
        "[each for each in self._users.get(_namespace(key), ()) if not self._is_lost(each)]",
        "[each for users in self._users.values() for each in users if not self._is_lost(each)]",
        f"{GPUS}::test_ranks_of_one_engine_are_no_replicas",
    ),
    Plant(
        "a GPU has a slab for each who asks",
        "server/hbm.py",
        "        if hello.gpu not in self._of_gpu:\n",
        "        if True:\n",
        f"{STORE}::TestWhoGetsWhat::test_another_tenants_engine_gets_none",
    ),
    Plant(
        "who plans leases in anybody's slab",
        "server/hbm.py",
        "is not None and arena.serves(name, gpu) else NO_HBM\n",
        "is not None else NO_HBM\n",
        f"{PLANNING}::test_another_trust_domain_has_nothing",
    ),
    Plant(
        "the lease of who plans is not that of the engine",
        "server/hbm_asking.py",
        "        return arena.lease(keys, self._identity.owner, expires_ns, context, request)\n",
        "        return arena.lease(keys, self._identity.owner, expires_ns, context, '')\n",
        f"{PLANNING}::test_its_lease_is_the_engines",
    ),
    Plant(
        "who maps nothing reports blocks",
        "server/hbm_asking.py",
        "            self._mapped()\n            lease",
        "            lease",
        f"{PLANNING}::test_it_neither_writes_nor_reports",
    ),
    Plant(
        "two who ask at once make two slabs",
        "server/hbm.py",
        "        if gpu not in self._making:\n",
        "        if True:\n",
        f"{MAKING}::test_two_who_ask_at_once_share_one",
    ),
    Plant(
        "engines wait for a GPU that did not answer again and again",
        "server/hbm.py",
        "        if self._is_closed or gpu in self._late:\n",
        "        if self._is_closed:\n",
        f"{MAKING}::test_who_waited_too_long_has_host_memory_now_and_hbm_next_time",
        waits=True,
    ),
    Plant(
        "a GPU that does not answer is waited for",
        "kvcache/tiers/hbm_demote.py",
        "asyncio.wait([running], timeout=ANSWER_S)",
        "asyncio.wait([running])",
        f"{HANGS}::test_a_gpu_that_hangs_while_nobody_asks",
        waits=True,
    ),
    Plant(
        "what a copy may still write to is used again",
        "kvcache/tiers/hbm_demote.py",
        "        return self._is_working or self._outlet.is_stuck\n",
        "        return self._outlet.is_stuck\n",
        f"{HANGS}::test_what_it_may_still_write_to_is_nobodys",
    ),
    Plant(
        "a prompt for another engine is left in HBM alone",
        "client/connectors/vllm_scheduler.py",
        '        return self._hbm and state.handoff.do != "prefill"\n',
        "        return self._hbm\n",
        f"{VLLM}::TestScheduler::test_a_prompt_for_another_engine_goes_to_where_other_nodes_find_it",
    ),
    Plant(
        "a vLLM worker takes a lease of its own",
        "client/connectors/vllm_moves.py",
        "self._store.lease_device if hbm and self._device is not None else self._store.lease\n",
        "self._store.lease\n",
        f"{VLLM}::TestWorker::test_it_takes_part_in_the_lease_and_moves_by_its_device",
    ),
    Plant(
        "vLLM's pages are read before what the engine had queued is done",
        "client/connectors/vllm_pages.py",
        "        self._streams.current().after(behind)\n",
        "",
        f"{PAGES}::test_pages_are_read_behind_what_the_engine_had_queued",
    ),
    Plant(
        "the pages of vLLM's kernels are taken for those of its scheduler",
        "client/connectors/vllm_pages.py",
        "[block_id * self._pieces + piece for piece in pieces]",
        "[block_id + piece for piece in pieces]",
        f"{PAGES}::test_there_and_back_between_engines_whose_pages_differ",
    ),
    Plant(
        "layers are published before they are computed",
        "client/connectors/vllm_stream.py",
        "        self._moves.follow(behind)\n        del",
        "        del",
        f"{VLLM}::TestWorker::test_layers_are_copied_behind_those_that_compute_them",
    ),
    Plant(
        "a vLLM scheduler is not told that a worker lacks HBM",
        "client/connectors/vllm_worker.py",
        "            self._lacks_hbm = lacks_hbm\n",
        "            pass\n",
        f"{VLLM}::TestWorker::test_without_a_slab_saves_go_to_host_memory",
    ),
    Plant(
        "what failed in HBM goes to the place of another block",
        "client/hbm_operations.py",
        "            had = yield from _had(context, below, into, positions[0] - start)\n",
        "            had = yield from _had(context, below, into, positions[0])\n",
        f"{CLIENT}::test_a_part_of_the_lease_from_the_middle_of_hbm",
    ),
    Plant(
        "failed blocks of HBM reported to host memory",
        "client/leasing.py",
        "Release(grant.lease_id, wrong, grant.tier)",
        "Release(grant.lease_id, wrong)",
        f"{CLIENT}::test_a_wrong_block_is_had_from_below_and_reported_to_hbm_alone",
    ),
    Plant(
        "a reservation is left open when the device fails",
        "client/hbm_saving.py",
        '    return BadInput("bad_block", "the device did not copy them", error.what)\n',
        '    return Unavailable("unavailable", "the device did not copy them", error.what)  # type: ignore\n',
        f"{SAVING}::test_a_save_that_the_device_does_not_do_is_given_back",
    ),
    Plant(
        "what came over the link is believed",
        "client/hbm_saving.py",
        "    if meant != found:\n",
        "    if False:\n",
        f"{SAVING}::test_what_the_link_gives_wrong_is_never_committed",
    ),
    Plant(
        "what HBM has no room for is not saved",
        "client/hbm_saving.py",
        "    if held < len(prefix):\n        below, reason",
        "    if held < 0:\n        below, reason",
        f"{STORE}::TestThereAndBack::test_what_does_not_fit_hbm_goes_to_host_memory",
    ),
    Plant(
        "saved to a GPU that this engine cannot read",
        "client/hbm_saving.py",
        " and not mapped.is_lost",
        "",
        f"{SAVING}::test_a_device_that_is_lost_is_not_saved_to",
    ),
    Plant(
        "the lease of the tiers below is kept after a fall-back",
        "client/hbm_operations.py",
        "        yield from leasing.release(context, below)\n        context.tally.add",
        "        context.tally.add",
        f"{CLIENT}::test_a_wrong_block_is_had_from_below_and_reported_to_hbm_alone",
    ),
    Plant(
        "blocks saved from pages are summed as they were in the slab before",
        "kvcache/device/saving.py",
        "            found = gather_and_sum(self.moves, self.slab, piece.first, piece.last)\n",
        "            at = self.moves.offsets.tolist()\n"
        "            found = sum_chunks(self.slab, at, self.spec, piece.first, piece.last)\n"
        "            gather_and_sum(self.moves, self.slab, piece.first, piece.last)\n",
        f"{STORE}::TestThereAndBack::test_into_pages_of_an_engine",
    ),
    Plant(
        "planes are copied before they are computed",
        "kvcache/device/saving.py",
        "        self._behind = [*self._behind, self._saves.streams.current().mark()]\n",
        "",
        f"{BESIDE}::test_a_plane_is_copied_behind_what_the_engine_computes_it_with[slab]",
        waits=True,
    ),
    Plant(
        "planes that were kept are copied behind the last place alone",
        "kvcache/device/saving.py",
        " and planes < spec.plane_count:\n            return\n",
        " and planes < spec.plane_count:\n            self._behind.pop()\n            return\n",
        f"{BESIDE}::test_planes_that_were_kept_are_copied_behind_their_own_place",
    ),
    Plant(
        "staging memory is given back under a copy",
        "kvcache/device/saving.py",
        "        return steps, partial(staging.give, part)\n",
        "        staging.give(part)\n        return steps, lambda: None\n",
        f"{BESIDE}::test_others_that_hold_all_staging_memory_are_waited_for",
    ),
    Plant(
        "the end of a save does not wait for its copies",
        "kvcache/device/saving.py",
        "        self._is_over = all(map(self._has_ended, events))\n",
        "        self._is_over = True\n",
        f"{BESIDE}::test_after_the_end_nothing_is_written",
    ),
    Plant(
        "saves are held to no cap",
        "kvcache/device/copies.py",
        "                    self._cap.spend(step.size_bytes)\n",
        "                    pass\n",
        f"{BESIDE}::test_the_cap_holds_what_crosses_the_link_and_nothing_else",
        waits=True,
    ),
    Plant(
        "what is given up is summed as far as it came",
        "kvcache/device/saving.py",
        "                self._failure = self._failure or given_up\n",
        "                pass\n",
        f"{BESIDE}::test_after_the_end_nothing_is_written",
    ),
    Plant(
        "a new connection says that writes have ended while they run",
        "client/blocking_store.py",
        "                attached.link.end_writings()\n        finally:\n",
        "                pass\n        finally:\n",
        f"{LAYERED}::test_no_connection_says_that_writes_have_ended_before_they_have",
        waits=True,
    ),
    Plant(
        "slots are given back while they are written",
        "client/hbm_layered.py",
        "            yield from hbm_saving.ended(context, begun.writing)\n",
        "",
        "tests/client/test_hbm_layered.py::test_nothing_is_given_back_before_its_copies_have_ended",
    ),
    Plant(
        "what came over the link plane by plane is believed",
        "client/hbm_layered.py",
        "        hbm_saving.check_arrived(context, meant, found)\n",
        "",
        "tests/client/test_hbm_layered.py::test_what_the_link_gives_wrong_is_never_committed",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
