"""Bugs put in on purpose: each must turn a named test red, or that test proves nothing.

Each plant replaces one passage of what ships, in a copy of the tree, and runs the tests that are to
catch it there. A control run shows that they pass in the copy as it is. ``python -m
tests.test_planted_bugs`` prints the list.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planting import Garden, Plant, copy_tree
from tests.planting import garden as garden

NODE = "tests/server/test_node.py"
FAULTS = "tests/client/test_faults.py"
KEY = "tests/transport/test_tcp_key.py"

PLANTS = (
    Plant(
        "publish before the bytes are written",
        "server/writing.py",
        "        if missing := self._written.missing(reservation, opened.spec.plane_count):\n",
        "        if missing := 0:\n",
        f"{NODE}::TestBytesOverTheSocket::test_commit_before_every_block_was_written",
    ),
    Plant(
        "publish at reserve",
        "server/writing.py",
        "        if reservation.reservation_id:\n",
        "        if reservation.reservation_id:\n"
        "            zero = [bytes(16)] * len(reservation.keys)\n"
        "            core.ledger.commit(reservation.reservation_id, self._identity.owner, zero, zero)\n",
        f"{NODE}::TestTheMap::test_bytes_go_through_the_map_only",
    ),
    Plant(
        "what came over the wire is not summed",
        "server/writing.py",
        "        if arrived != list(sums):\n",
        "        if False:\n",
        f"{NODE}::TestBytesOverTheSocket::test_bytes_that_changed_on_the_way_are_not_published",
    ),
    Plant(
        "lease not released on disconnect",
        "kvcache/ledger.py",
        "        self._leases.disconnect(owner)\n",
        "",
        f"{NODE}::TestTheMap::test_a_connection_without_a_map_frees_at_once",
    ),
    Plant(
        "slots of a vanished writer used again at once",
        "kvcache/ledger.py",
        "        if writes_ended:\n",
        "        if True:\n",
        f"{NODE}::TestTheMap::test_slots_of_a_closed_connection_wait_for_its_process",
    ),
    Plant(
        "a reader's word is taken without looking",
        "server/core.py",
        "if self.checksums(opened, [lease.keys[at]], [sums]) == [expected]:",
        "if False:",
        f"{NODE}::TestTheMap::test_a_failed_block_is_looked_at_and_quarantined",
    ),
    Plant(
        "the key left out of the checksum",
        "kvcache/sums.py",
        "xxhash.xxh3_128_digest(_BLOCK_TAG + key + shape + sums)",
        "xxhash.xxh3_128_digest(_BLOCK_TAG + shape + sums)",
        f"{FAULTS}::test_a_node_that_answers_with_another_prompts_blocks_is_found",
    ),
    Plant(
        "a field of the fingerprint ignored",
        "kvcache/namespace.py",
        "        encoded = _encode(self.to_map().items())\n",
        '        encoded = _encode(item for item in self.to_map().items() if item[0] != "dtype")\n',
        f"{NODE}::TestNamespaces::test_different_fields_never_share_blocks",
    ),
    Plant(
        "the generation not checked",
        "kvcache/ledger.py",
        "        if self._holdings.generation[block] != generation:\n",
        "        if False:\n",
        "tests/kvcache/test_ledger_faults.py::test_what_was_written_anew_is_not_withdrawn_for_the_old",
    ),
    Plant(
        "bytes handed out without their check",
        "client/operations.py",
        "        if found != grant.checksums[at : at + CHECKSUM_BYTES]:\n",
        "        if False:\n",
        f"{FAULTS}::test_a_flipped_byte_is_found_reported_and_taken_out",
    ),
    Plant(
        "a read that outlasted its lease is believed",
        "client/operations.py",
        "    if context.clock.now_ns() >= grant.expires_ns:\n",
        "    if False:\n",
        f"{FAULTS}::test_after_its_end_a_lease_gives_nothing",
    ),
    Plant(
        "a slab that can be cut short is mapped",
        "kvcache/memfd.py",
        "    if not seals & fcntl.F_SEAL_SHRINK:\n",
        "    if False:\n",
        f"{FAULTS}::test_memory_that_could_be_taken_away_is_not_mapped",
    ),
    Plant(
        "the parent of the next batch is forgotten",
        "client/operations.py",
        "        parent = batch[-1]\n",
        "",
        "tests/client/test_operations.py",
    ),
    Plant(
        "the slab can be cut short",
        "kvcache/memfd.py",
        "        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)\n",
        "",
        f"{NODE}::TestTheMap::test_it_cannot_be_cut_short",
    ),
    Plant(
        "the tenant is taken from the message",
        "server/handlers.py",
        '        if fields.get("tenant", "") not in ("", self._identity.tenant):\n',
        "        if False:\n",
        f"{NODE}::TestNamespaces::test_another_tenants_name_is_refused",
    ),
    Plant(
        "a wide bind without a token",
        "server/binding.py",
        "    if bind is not None and not is_loopback(bind[0]) and not credentials.has_tokens:\n",
        "    if False:\n",
        f"{NODE}::TestStarting::test_a_wide_bind_without_a_token",
    ),
    Plant(
        "a second node takes over the socket",
        "server/listening.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        f"{NODE}::TestStarting::test_two_nodes_on_one_socket",
    ),
    Plant(
        "an entry is published before its block is written",
        "kvcache/tiers/nvme.py",
        "        self._write_blocks(final, [view for _, view in puts])\n"
        "        self._publish(final, deleted, durable=durable)\n",
        "        self._publish(final, deleted, durable=durable)\n"
        "        self._write_blocks(final, [view for _, view in puts])\n",
        "tests/faults/test_kill.py::test_what_was_stored_is_there_and_right[a-few]",
    ),
    Plant(
        "blocks are not synced before they are published",
        "kvcache/tiers/nvme.py",
        "                os.fdatasync(descriptor)\n                self._files.forget_cached(descriptor)\n",
        "                self._files.forget_cached(descriptor)\n",
        "tests/faults/test_power_cut.py::test_with_the_sync_none_is_refused",
    ),
    Plant(
        "a durable commit is not synced",
        "kvcache/tiers/nvme_index_child.py",
        "            if durable:\n",
        "            if False:\n",
        "tests/kvcache/tiers/test_nvme_index_faults.py::test_a_commit_is_synced_and_a_durable_one_twice",
    ),
    Plant(
        "a slot is used again while the index names its old block",
        "kvcache/tiers/nvme.py",
        "        if stale:\n",
        "        if False:\n",
        "tests/faults/test_kill.py::test_what_was_stored_is_there_and_right[a-few]",
    ),
    Plant(
        "a slot's generation is not checked",
        "kvcache/tiers/nvme_slots.py",
        "    if found != expected:\n",
        "    if found.key != expected.key:\n",
        "tests/faults/test_misplaced.py::test_what_was_in_the_slot_before",
    ),
    Plant(
        "the key left out of the checksum of a block on disk",
        "kvcache/sums.py",
        "xxhash.xxh3_128_digest(_BLOCK_TAG + key + shape + sums)",
        "xxhash.xxh3_128_digest(_BLOCK_TAG + shape + sums)",
        "tests/faults/test_misplaced.py::test_bytes_under_a_key_that_is_not_theirs",
    ),
    Plant(
        "what came while drives were synced is called durable",
        "kvcache/tiers/stack.py",
        "min(written, self.ledger.match(keys))",
        "self.ledger.match(keys)",
        "tests/kvcache/tiers/test_stack_durable.py::test_what_is_written_while_drives_are_synced_is_not_durable",
    ),
    Plant(
        "an index value is believed without its guard",
        "kvcache/tiers/nvme_format.py",
        "        if guard_sum(fields) == guard\n",
        "        if guard\n",
        "tests/faults/test_flips.py::test_of_the_index_values",
    ),
    Plant(
        "a slot header is believed without its guard",
        "kvcache/tiers/nvme_format.py",
        "    if guard_sum(memoryview(whole)[:_GUARD_AT]) != whole[_GUARD_AT:]:\n",
        "    if False:\n",
        "tests/faults/test_flips.py::test_of_a_slot[header]",
    ),
    Plant(
        "a segment's size without its header",
        "kvcache/tiers/extents.py",
        "        return max(0, extent_bytes - self.extent_header_bytes) // stride\n",
        "        return extent_bytes // stride\n",
        "tests/kvcache/tiers/test_space.py::test_a_segment_holds_its_header_and_whole_strides",
    ),
    Plant(
        "a slot's size without its header",
        "kvcache/tiers/extents.py",
        "-(-(self.slot_header_bytes + block_bytes) // self.align_bytes)",
        "-(-block_bytes // self.align_bytes)",
        "tests/kvcache/test_ledger_random.py::test_a_long_day",
    ),
    Plant(
        "who connects proves nothing",
        "kvcache/transport/tcp_listener.py",
        "        if not is_proof(await receive(sock, PROOF_BYTES), self._key, CONNECTS, said):\n",
        "        if not await receive(sock, PROOF_BYTES):\n",
        f"{KEY}::test_a_proof_is_good_for_its_own_connection_only",
        waits=True,
    ),
    Plant(
        "who listens proves nothing",
        "kvcache/transport/tcp.py",
        "    if not is_proof(answer, key, LISTENS, said):\n",
        "    if not answer:\n",
        f"{KEY}::test_who_listens_proves_it_too",
    ),
    Plant(
        "a proof is good for either side",
        "kvcache/transport/keys.py",
        "person=role",
        'person=b""',
        f"{KEY}::test_our_own_proof_and_nonce_sent_back_are_no_proof",
    ),
    Plant(
        "the challenge is the same each time",
        "kvcache/transport/tcp_listener.py",
        "pack_challenge(new_nonce())",
        "pack_challenge(bytes(32))",
        f"{KEY}::test_a_proof_is_good_for_its_own_connection_only",
    ),
    Plant(
        "any role acts for any tenant",
        "kvcache/credentials.py",
        'may = "peer" in credential.roles and',
        "may =",
        "tests/server/test_peer_rights.py::test_nobody_else_names_a_tenant",
    ),
    Plant(
        "everybody is told where bytes are moved",
        "server/node.py",
        'data=self.core.plane.addresses if "peer" in identity.roles else []',
        "data=self.core.plane.addresses",
        "tests/server/test_peer_rights.py::test_where_bytes_are_moved_is_told_to_peers_alone",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
def test_the_copy_tests_itself(tmp_path: Path) -> None:
    copy = copy_tree(tmp_path)
    command = [sys.executable, "-B", "-c", "import kvcache; print(kvcache.__file__)"]
    done = subprocess.run(command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True)
    assert Path(done.stdout.decode().strip()).is_relative_to(copy)


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)


if __name__ == "__main__":
    for each in PLANTS:
        sys.stdout.write(f"{each.name}: {each.file}, caught by {each.caught_by}\n")
