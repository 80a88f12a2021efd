"""What identifies weights: fine-tunes of the same shape differ, copies do not, absence is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache import weights
from kvcache.errors import BadInput
from tests.kvcache.elsewhere import printed_elsewhere

LARGE = weights.WHOLE_BYTES_MAX + 4_096
BIAS_BYTES = 512
CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 64,
    "rope_theta": 10_000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "max_position_embeddings": 4_096,
    "rms_norm_eps": 1e-5,
    "text_config": {"rope_parameters": {"rope_theta": 5e5}, "num_hidden_layers": 2},
}


def safetensors(tensors: dict[str, int], seed: int = 0, metadata: bool = True) -> bytearray:
    """A file of this format with tensors of these sizes in bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if metadata else {}
    end = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + random.Random(seed).randbytes(end))


def model(folder: Path, content: bytes | bytearray = b"weights", name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BadInput) as caught:
        call()
    assert caught.value.code == "bad_weights"
    assert caught.value.todo
    return str(caught.value)


class TestSmallFiles:
    def test_a_golden_vector_in_processes_with_other_hash_seeds(self, tmp_path: Path) -> None:
        """Namespaces carry it: a change here makes every stored block unreachable."""
        path = model(tmp_path / "m")
        program = f"from kvcache import weights\nprint(weights.digest({str(path)!r}))\n"
        assert printed_elsewhere(program) == [["85eb4c0b86bf7d769fba485421f69925"]] * 2

    def test_a_copy_elsewhere_is_the_same(self, tmp_path: Path) -> None:
        assert weights.digest(model(tmp_path / "a")) == weights.digest(str(model(tmp_path / "b" / "c")))

    def test_one_flipped_bit_anywhere(self, tmp_path: Path) -> None:
        content = safetensors({"a": 64})
        digests = {weights.digest(model(tmp_path, content))}
        for at in range(len(content)):
            changed = bytearray(content)
            changed[at] ^= 1
            digests.add(weights.digest(model(tmp_path, changed)))
        assert len(digests) == len(content) + 1

    def test_names_count(self, tmp_path: Path) -> None:
        assert weights.digest(model(tmp_path / "a")) != weights.digest(
            model(tmp_path / "b", name="other.bin")
        )

    def test_a_boundary_between_files_counts(self, tmp_path: Path) -> None:
        for folder, first, second in (("a", b"12", b"3"), ("b", b"1", b"23")):
            model(tmp_path / folder, first, "1.bin")
            model(tmp_path / folder, second, "2.bin")
        assert weights.digest(tmp_path / "a") != weights.digest(tmp_path / "b")

    @pytest.mark.parametrize(
        "name",
        ["config.json", "adapter_config.json", "modeling.py", "model.safetensors.index.json", "sub/2.pt"],
    )
    def test_what_shapes_the_numbers_counts(self, tmp_path: Path, name: str) -> None:
        before = weights.digest(model(tmp_path))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        assert weights.digest(tmp_path) != before

    @pytest.mark.parametrize(
        "name", ["README.md", "tokenizer.json", ".cache/part.bin", ".git/a.pt", "notes.txt"]
    )
    def test_what_does_not_is_left_out(self, tmp_path: Path, name: str) -> None:
        before = weights.digest(model(tmp_path))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        assert weights.digest(tmp_path) == before

    def test_an_empty_weights_file_is_one(self, tmp_path: Path) -> None:
        assert weights.digest(model(tmp_path / "a", b"")) != weights.digest(model(tmp_path / "b", b"\0"))

    def test_one_file(self, tmp_path: Path) -> None:
        path = model(tmp_path) / "model.safetensors"
        assert weights.digest(path) not in ("", weights.digest(tmp_path))


class TestLargeFiles:
    @pytest.mark.parametrize("name", ["model.bin", "model.gguf", "model.safetensors"])
    def test_a_fine_tune_of_the_same_shape_differs(self, tmp_path: Path, name: str) -> None:
        base, tuned = safetensors({"a": LARGE}, seed=1), safetensors({"a": LARGE}, seed=2)
        assert len(base) == len(tuned)
        assert base[:60] == tuned[:60]
        assert weights.digest(model(tmp_path, base, name)) != weights.digest(model(tmp_path, tuned, name))

    @pytest.mark.parametrize("at", [0, 4_095, -4_096, -1, LARGE // 2])
    def test_ends_and_windows_are_seen_in_any_format(self, tmp_path: Path, at: int) -> None:
        content = bytearray(LARGE)
        before = weights.digest(model(tmp_path, content, "model.bin"))
        windows = weights.WINDOW_COUNT - 1
        near = at if at in (0, 4_095, -4_096, -1) else (LARGE - 4_096) * (windows // 2) // windows
        content[near] ^= 1
        assert weights.digest(model(tmp_path, content, "model.bin")) != before

    @pytest.mark.slow
    def test_a_change_of_one_small_tensor_is_seen(self, tmp_path: Path) -> None:
        """A fine-tune of biases only: 512 bytes among 40 MB, between two windows."""
        shapes = {"w1": 20_000_000, "bias": BIAS_BYTES, "w2": 20_000_000}
        content = safetensors(shapes)
        start = len(content) - 20_000_000 - BIAS_BYTES
        assert not sampled(start, BIAS_BYTES, len(content))
        digests = {weights.digest(model(tmp_path, content))}
        for at in (start, start + BIAS_BYTES // 2, start + BIAS_BYTES - 1):
            changed = bytearray(content)
            changed[at] ^= 1
            digests.add(weights.digest(model(tmp_path, changed)))
        assert len(digests) == 4

    @pytest.mark.slow
    def test_the_middle_of_every_tensor_is_seen(self, tmp_path: Path) -> None:
        content = safetensors({"a": 9_000_000, "b": 31_000_000})
        before = weights.digest(model(tmp_path, content))
        content[-31_000_000 // 2] ^= 1
        assert weights.digest(model(tmp_path, content)) != before

    def test_size_counts_where_nothing_else_does(self, tmp_path: Path) -> None:
        one = weights.digest(model(tmp_path / "a", bytes(LARGE), "m.bin"))
        assert weights.digest(model(tmp_path / "b", bytes(LARGE + 1), "m.bin")) != one

    @pytest.mark.parametrize(
        "start",
        [
            b"\xff" * 8,
            (LARGE * 2).to_bytes(8, "little"),
            (64).to_bytes(8, "little") + b"no json",
            (64).to_bytes(8, "little") + b'{"a":{"data_offsets":[5,1]}}'.ljust(64),
            (64).to_bytes(8, "little") + b'{"a":{"data_offsets":[-9,99999999999]}}'.ljust(64),
            (64).to_bytes(8, "little") + b'{"a":{"data_offsets":["x",[]]}}'.ljust(64),
            (64).to_bytes(8, "little") + b'{"a":7,"b":null}'.ljust(64),
            (64).to_bytes(8, "little") + b"[1]".ljust(64),
            (5_000).to_bytes(8, "little") + b"[" * 5_000,
        ],
    )
    def test_a_damaged_header_is_digested_as_bytes(self, tmp_path: Path, start: bytes) -> None:
        content = start + bytes(LARGE - len(start))
        whole = weights.digest(model(tmp_path, content))
        assert len(whole) == 32
        assert weights.digest(model(tmp_path, content[:-1] + b"x")) != whole

    @pytest.mark.slow
    def test_few_bytes_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []
        real = os.pread
        path = model(tmp_path, safetensors({"a": LARGE, "b": LARGE * 3}))

        def pread(descriptor: int, length: int, offset: int) -> bytes:
            read.append(length)
            return real(descriptor, length, offset)

        monkeypatch.setattr(os, "pread", pread)
        weights.digest(path)
        assert sum(read) < 5 << 20


class TestRefusals:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "missing" in refused(lambda: weights.digest(tmp_path / "missing"))

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert ".safetensors" in refused(lambda: weights.digest(tmp_path))

    def test_a_broken_link(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").symlink_to(tmp_path / "gone")
        assert "cannot be read" in refused(lambda: weights.digest(tmp_path))

    def test_a_file_that_shrinks_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = model(tmp_path)
        monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: b"")
        assert "changed" in refused(lambda: weights.digest(path))

    def test_too_many_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(weights, "FILES_MAX", 1)
        assert "over 1" in refused(lambda: weights.digest(model(tmp_path)))

    @pytest.mark.parametrize("name", ["", "a\0b", "x" * 5_000, "\ud800"])
    def test_names_that_no_file_can_have(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        refused(lambda: weights.digest(name, hub_cache=tmp_path))


class TestTheHubsCache:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        repository = tmp_path / "hub" / "models--org--name"
        for commit in ("c1", "c2"):
            model(repository / "blobs", commit.encode(), commit)
            snapshot = repository / "snapshots" / commit
            snapshot.mkdir(parents=True)
            (snapshot / "model.safetensors").symlink_to(repository / "blobs" / commit)
        (repository / "refs" / "pr").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c1\n")
        (repository / "refs" / "pr" / "1").write_text("c2")
        (tmp_path / "hub" / "elsewhere").mkdir()
        return tmp_path / "hub"

    def test_a_model_by_its_id(self, cache: Path) -> None:
        main = weights.digest("org/name", hub_cache=cache)
        assert main == weights.digest("org/name", "c1", cache)
        assert main == weights.digest(cache / "models--org--name" / "snapshots" / "c1")
        other = weights.digest("org/name", "c2", cache)
        assert other == weights.digest("org/name", "pr/1", cache)
        assert other != main

    def test_where_the_environment_says(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        main = weights.digest("org/name", hub_cache=cache)
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (
            ("HF_HUB_CACHE", cache),
            ("HUGGINGFACE_HUB_CACHE", cache),
            ("HF_HOME", cache.parent),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(name, str(value))
                assert weights.digest("org/name") == main

    @pytest.mark.parametrize("revision", ["c3", "../../elsewhere", "..", ".", "/", "c1/..", "refs/../c1"])
    def test_a_revision_that_is_not_there(self, cache: Path, revision: str) -> None:
        refused(lambda: weights.digest("org/name", revision, cache))

    @pytest.mark.parametrize("name", ["org/other", "name", "..", "org/name/../name"])
    def test_a_model_that_is_not_there(
        self, cache: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a" / "b")
        refused(lambda: weights.digest(name, hub_cache=cache))


class TestConfigurations:
    def test_golden_vectors_in_processes_with_other_hash_seeds(self) -> None:
        program = (
            f"from kvcache import weights\nconfig = {CONFIG!r}\n"
            "print(weights.config_digest(config), weights.rope_digest(config))\n"
        )
        assert (
            printed_elsewhere(program)
            == [["6f6be2f7511355d9ffe54843462fdafd", "4891a297baf4539899dc841cc3611336"]] * 2
        )

    def test_the_order_does_not_count(self) -> None:
        turned = dict(reversed(CONFIG.items()))
        assert weights.config_digest(turned) == weights.config_digest(CONFIG)
        assert weights.rope_digest(turned) == weights.rope_digest(CONFIG)

    @pytest.mark.parametrize("name", sorted(CONFIG))
    def test_every_setting_counts(self, name: str) -> None:
        assert weights.config_digest({**CONFIG, name: "other"}) != weights.config_digest(CONFIG)

    @pytest.mark.parametrize("name", ["transformers_version", "_name_or_path", "torch_dtype", "use_cache"])
    def test_but_for_what_changes_no_number(self, name: str) -> None:
        assert weights.config_digest({**CONFIG, name: "other"}) == weights.config_digest(CONFIG)

    @pytest.mark.parametrize(
        "change",
        [
            {"rope_theta": 10_001.0},
            {"rope_scaling": None},
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"max_position_embeddings": 8_192},
            {"partial_rotary_factor": 0.5},
            {"alibi": True},
            {"text_config": {"rope_parameters": {"rope_theta": 1e6}, "num_hidden_layers": 2}},
            {"vision_config": {"rope_parameters": {"rope_theta": 5e5}}},
        ],
    )
    def test_every_setting_of_positions_counts(self, change: dict[str, object]) -> None:
        assert weights.rope_digest({**CONFIG, **change}) != weights.rope_digest(CONFIG)

    def test_no_other_setting_does(self) -> None:
        assert weights.rope_digest({**CONFIG, "hidden_size": 1, "rms_norm_eps": 1}) == weights.rope_digest(
            CONFIG
        )

    def test_depth_is_not_confused_with_names(self) -> None:
        flat, deep = {"a/rope": 1}, {"a": {"rope": 1}}
        assert weights.rope_digest(flat) != weights.rope_digest(deep)

    @pytest.mark.parametrize("value", [object(), b"x", {1: 1, "a": 2}, {(1,): 2}])
    def test_what_json_cannot_say(self, value: object) -> None:
        refused(lambda: weights.config_digest({"rope": value}))
        refused(lambda: weights.rope_digest({"rope": value}))

    def test_read_config(self, tmp_path: Path) -> None:
        assert weights.read_config(model(tmp_path)) == CONFIG
        assert weights.config_digest(weights.read_config(tmp_path)) == weights.config_digest(CONFIG)

    @pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * (16 << 20) + b"{}"])
    def test_read_config_refuses(self, tmp_path: Path, text: bytes) -> None:
        (tmp_path / "config.json").write_bytes(text)
        assert "config.json" in refused(lambda: weights.read_config(tmp_path))

    def test_read_config_of_nothing(self, tmp_path: Path) -> None:
        refused(lambda: weights.read_config(tmp_path))


def sampled(start: int, length: int, size: int) -> bool:
    """Does an evenly spaced window touch these bytes?"""
    last, count, window = size - weights.WINDOW_BYTES, weights.WINDOW_COUNT - 1, weights.WINDOW_BYTES
    offsets = (last * number // count for number in range(count + 1))
    return any(offset < start + length and start < offset + window for offset in offsets)
