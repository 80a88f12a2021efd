"""The credentials file: who it lets in, and every way in which it is refused."""

from __future__ import annotations

import hmac
import os
import re
from hashlib import blake2b
from pathlib import Path

import pytest

from kvcache.credentials import FILE_BYTES_MAX, ROLES, Credential, Credentials
from kvcache.errors import BadInput
from tests.kvcache.elsewhere import printed_elsewhere

ROOT = Path(__file__).parent.parent.parent
MASTER = "00112233445566778899aabbccddeeff" * 2
TOKEN = "a-token-of-team-a-0001"
OTHER = "a-token-of-team-b-0002"
GOOD = f"""
master_key = "{MASTER}"

[[credential]]
token = "{TOKEN}"
tenant = "team-a"
roles = ["reader", "writer"]

[[credential]]
token = "{OTHER}"
tenant = "team-b"
roles = ["router"]

[[credential]]
uid = 1000
tenant = "team-a"
roles = ["operator"]
"""
TEAM_A = Credential("team-a", frozenset({"reader", "writer"}))

# A tenant's blocks are named under its key: a change here orphans them all.
GOLDEN_DEFAULT = "4cacb2a8e3c223a147d90f1703e3e04fa94bba1a0dda6cf04c0a81bad54c2262"
GOLDEN_TEAM_A = "6fae0a67c3ad725f0b3b64a4c0573a87745bcd09cbdadf99748d00caf9cb18db"


def written(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "credentials.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def load(tmp_path: Path, text: str = GOOD) -> Credentials:
    return Credentials.from_file(written(tmp_path, text))


def refusal(path: Path) -> BadInput:
    with pytest.raises(BadInput) as caught:
        Credentials.from_file(path)
    assert caught.value.code == "bad_credentials"
    assert caught.value.todo
    for secret in (TOKEN, OTHER, MASTER):
        assert secret not in str(caught.value)
    return caught.value


def refused(tmp_path: Path, text: str) -> str:
    return str(refusal(written(tmp_path, text)))


def one(entry: str) -> str:
    """A file with the one credential ``entry``."""
    return f'master_key = "{MASTER}"\n[[credential]]\n{entry}\n'


class TestWhoIsLetIn:
    def test_a_token(self, tmp_path: Path) -> None:
        assert load(tmp_path).by_token(TOKEN) == TEAM_A
        assert load(tmp_path).by_token(OTHER) == Credential("team-b", frozenset({"router"}))

    @pytest.mark.parametrize(
        "token", ["", TOKEN[:-1], TOKEN + " ", TOKEN.upper(), TOKEN + "\0", "\ud800", "x" * 100_000]
    )
    def test_no_other_token(self, tmp_path: Path, token: str) -> None:
        assert load(tmp_path).by_token(token) is None

    def test_a_user(self, tmp_path: Path) -> None:
        credentials = load(tmp_path)
        assert credentials.by_uid(1000) == Credential("team-a", frozenset({"operator"}))
        assert credentials.by_uid(1001) is None
        assert credentials.by_uid(-1) is None

    def test_nobody_without_a_credential(self, tmp_path: Path) -> None:
        assert load(tmp_path).anonymous is None
        assert load(tmp_path).by_uid(os.getuid()) is None

    def test_a_file_of_users_only_has_no_tokens(self, tmp_path: Path) -> None:
        assert load(tmp_path).has_tokens
        assert not load(tmp_path, one('uid = 7\ntenant = "a"\nroles = ["reader"]')).has_tokens

    def test_every_token_is_compared_by_its_digest_whatever_is_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Constant time, as far as a test without a stopwatch can say it."""
        credentials = load(tmp_path)
        compared: list[tuple[int, int]] = []

        def compare(known: bytes, asked: bytes) -> bool:
            compared.append((len(known), len(asked)))
            return known == asked

        monkeypatch.setattr(hmac, "compare_digest", compare)
        for token in (TOKEN, OTHER, "", "x" * 1_000):
            credentials.by_token(token)
        assert compared == [(32, 32)] * 8

    def test_without_a_file(self) -> None:
        credentials = Credentials.default()
        everything = Credential("default", frozenset(ROLES))
        assert credentials.by_uid(os.getuid()) == everything
        anybody = frozenset({"reader", "writer", "router", "peer"})
        assert credentials.anonymous == Credential("default", anybody)
        assert credentials.by_uid(os.getuid() + 1) is None
        assert credentials.by_token(TOKEN) is None
        assert not credentials.has_tokens


class TestWhoActsForWhom:
    PEER = Credential("nodes", frozenset({"peer", "reader"}))

    def test_a_peer_for_any_tenant_with_its_own_roles(self, tmp_path: Path) -> None:
        acting = load(tmp_path).acting_for(self.PEER, "team-b")
        assert acting == Credential("team-b", self.PEER.roles)

    def test_everybody_for_his_own(self, tmp_path: Path) -> None:
        for tenant in ("", "team-a"):
            assert load(tmp_path).acting_for(TEAM_A, tenant) is TEAM_A

    @pytest.mark.parametrize("role", sorted(set(ROLES) - {"peer"}))
    def test_no_other_role_for_another(self, tmp_path: Path, role: str) -> None:
        assert load(tmp_path).acting_for(Credential("team-a", frozenset({role})), "team-b") is None

    @pytest.mark.parametrize("tenant", ["A", "a b", "../a", "a\n", "a" * 65, "\0"])
    def test_nobody_for_what_is_no_tenant(self, tmp_path: Path, tenant: str) -> None:
        assert load(tmp_path).acting_for(self.PEER, tenant) is None

    def test_without_a_file_there_is_one_tenant(self) -> None:
        credentials = Credentials.default()
        user = credentials.by_uid(os.getuid())
        assert user is not None
        assert credentials.acting_for(user, "default") is user
        assert credentials.acting_for(user, "team-b") is None


class TestTenantKeys:
    def test_golden_vectors_in_processes_with_other_hash_seeds(self, tmp_path: Path) -> None:
        program = (
            "from kvcache.credentials import Credentials\n"
            "print(Credentials.default().tenant_key('default').hex())\n"
            f"print(Credentials.from_file({str(written(tmp_path, GOOD))!r}).tenant_key('team-a').hex())\n"
        )
        assert printed_elsewhere(program) == [[GOLDEN_DEFAULT, GOLDEN_TEAM_A]] * 2

    def test_spelled_out(self) -> None:
        key = blake2b(bytes.fromhex(MASTER), digest_size=32).digest()
        made = blake2b(b"team-a", digest_size=32, key=key, person=b"kvcache.tenant.1")
        assert made.hexdigest() == GOLDEN_TEAM_A

    def test_each_tenant_and_each_master_key_has_its_own(self, tmp_path: Path) -> None:
        one_key, other_key = load(tmp_path), load(tmp_path, GOOD.replace("00112233", "00112234"))
        keys = {made.tenant_key(tenant) for made in (one_key, other_key) for tenant in ("team-a", "team-b")}
        assert len(keys) == 4
        assert {len(key) for key in keys} == {32}

    def test_a_key_file_lies_beside_the_credentials(self, tmp_path: Path) -> None:
        text = GOOD.replace(f'master_key = "{MASTER}"', 'master_key_file = "master.key"')
        key = tmp_path / "master.key"
        key.write_bytes(bytes.fromhex(MASTER))
        key.chmod(0o600)
        assert load(tmp_path, text).tenant_key("team-a").hex() == GOLDEN_TEAM_A
        key.chmod(0o640)
        assert "chmod 600" in refused(tmp_path, text)
        key.unlink()
        assert "master.key" in refused(tmp_path, text)


class TestTheFileIsPrivate:
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
    def test_others_may_do_nothing_with_it(self, tmp_path: Path, mode: int) -> None:
        error = refusal(written(tmp_path, GOOD, mode))
        assert f"{mode:o}" in error.what
        assert "chmod 600" in error.todo

    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_its_owner_may(self, tmp_path: Path, mode: int) -> None:
        assert Credentials.from_file(written(tmp_path, GOOD, mode)).has_tokens

    def test_what_a_link_points_to_counts(self, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(written(tmp_path, GOOD, 0o644))
        assert "644" in refusal(link).what

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_another_users_file_is_refused(self, tmp_path: Path) -> None:
        path = written(tmp_path, GOOD)
        os.chown(path, 12_345, 12_345)
        assert "12345" in refusal(path).what

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        assert "cannot be read" in refusal(tmp_path / "missing").what
        assert "regular" in refusal(tmp_path).what
        os.mkfifo(tmp_path / "fifo", 0o600)
        assert "regular" in refusal(tmp_path / "fifo").what

    def test_the_reason_is_in_words(self, tmp_path: Path) -> None:
        error = refusal(tmp_path / "missing")
        assert error.why == f"No such file or directory: {tmp_path / 'missing'}"
        assert "Errno" not in str(error)


def test_the_example_for_operators_is_taken(tmp_path: Path) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    key = tmp_path / "master.key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    found = Credentials.from_file(written(tmp_path, example))
    assert found.has_tokens
    assert found.lists_other_users(0)


class TestRefusals:
    def test_what_is_no_toml(self, tmp_path: Path) -> None:
        assert "line 1" in refused(tmp_path, "master_key = = 1")
        assert "cannot be read" in refused(tmp_path, "x = " + "[" * 50_000)
        path = written(tmp_path, "")
        path.write_bytes(b"\xff\xfe")
        refusal(path)

    def test_too_large(self, tmp_path: Path) -> None:
        assert "over" in refused(tmp_path, GOOD + "#" * FILE_BYTES_MAX)

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [("tokn", "token"), ("tenants", "tenant"), ("masterkey", "master_key"), ("role", "roles")],
    )
    def test_an_unknown_name_says_what_was_meant(self, tmp_path: Path, wrong: str, meant: str) -> None:
        said = refused(tmp_path, GOOD.replace(f"{meant} =", f"{wrong} =", 1))
        assert wrong in said
        assert f"did you mean '{meant}'?" in said

    @pytest.mark.parametrize(
        "entry",
        [
            'tenant = "a"\nroles = ["reader"]',
            f'token = "{TOKEN}"\nuid = 1\ntenant = "a"\nroles = ["reader"]',
            f'token = "{TOKEN}"\nroles = ["reader"]',
            f'token = "{TOKEN}"\ntenant = "a"',
            f'token = "{TOKEN}"\ntenant = "a"\nroles = []',
            f'token = "{TOKEN}"\ntenant = "a"\nroles = ["reader", "admin"]',
            f'token = "{TOKEN}"\ntenant = "a"\nroles = "reader"',
            'token = "short"\ntenant = "a"\nroles = ["reader"]',
            'token = 1234567890123456\ntenant = "a"\nroles = ["reader"]',
            f'token = "{TOKEN} with spaces"\ntenant = "a"\nroles = ["reader"]',
            f'token = "{TOKEN}é"\ntenant = "a"\nroles = ["reader"]',
            'uid = -1\ntenant = "a"\nroles = ["reader"]',
            'uid = true\ntenant = "a"\nroles = ["reader"]',
            'uid = "1000"\ntenant = "a"\nroles = ["reader"]',
        ],
    )
    def test_an_entry_that_is_not_whole_or_not_right(self, tmp_path: Path, entry: str) -> None:
        assert "credential" in refused(tmp_path, one(entry))

    @pytest.mark.parametrize(
        "tenant", ["", "A", "-a", ".a", "a b", "a/b", "a\\n", "é", "a" * 65, "../a", "a\\u0000", "default\\n"]
    )
    def test_a_tenant_outside_the_pattern(self, tmp_path: Path, tenant: str) -> None:
        said = refused(tmp_path, one(f'uid = 1\ntenant = "{tenant}"\nroles = ["reader"]'))
        assert "tenant of credential 1" in said

    @pytest.mark.parametrize("tenant", ["a", "0", "team-a", "team.a_1", "a" * 64])
    def test_a_tenant_inside_the_pattern(self, tmp_path: Path, tenant: str) -> None:
        found = load(tmp_path, one(f'uid = 1\ntenant = "{tenant}"\nroles = ["reader"]')).by_uid(1)
        assert found is not None
        assert found.tenant == tenant

    def test_the_same_token_or_user_twice(self, tmp_path: Path) -> None:
        assert "credential 2 repeats" in refused(tmp_path, GOOD.replace(OTHER, TOKEN))
        assert "credential 4 repeats" in refused(
            tmp_path, GOOD + '[[credential]]\nuid = 1000\ntenant = "team-b"\nroles = ["reader"]\n'
        )

    def test_nobody(self, tmp_path: Path) -> None:
        assert "no credential" in refused(tmp_path, f'credential = []\nmaster_key = "{MASTER}"')

    @pytest.mark.parametrize(
        "line",
        [
            "",
            'master_key = ""',
            'master_key = "00"',
            f'master_key = "{MASTER[:-2]}"',
            f'master_key = "{MASTER[:-1]}g"',
            f'master_key = "{MASTER}"\nmaster_key_file = "master.key"',
            'master_key_file = "."',
        ],
    )
    def test_the_master_key(self, tmp_path: Path, line: str) -> None:
        refused(tmp_path, GOOD.replace(f'master_key = "{MASTER}"', line))
