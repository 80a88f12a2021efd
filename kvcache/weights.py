"""What identifies a model's weights: a digest of their content, without loading them.

Fine-tunes have the same names, shapes and sizes as their base, and the KV of one is wrong for the other;
so headers are not enough and the numbers themselves are read. A directory is digested as its files that
shape the numbers (weights, configuration, model code), each with its name and size, and of its content

    up to 8 MiB                the whole
    more                       1,024 windows of 4 KiB at equal distances, first and last bytes included
    more, and safetensors      besides: the whole header, and the middle 4 KiB of every tensor, so that a
                               fine-tune that touched only biases or norms is seen too

The positions follow from size and header alone, so the digest of the same files is the same everywhere.
It tells honest mistakes apart; who can write the model directory can deceive it, and the engine too.

The sum: a 5 GB shard of 80 tensors costs 1,104 reads, about 4.4 MiB; a 140 GB model 130 MiB, under a
second from the page cache and a few seconds from a cold disk, against minutes to load it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from kvcache.errors import BadInput

WHOLE_BYTES_MAX = 8 << 20
WINDOW_BYTES = 4_096
WINDOW_COUNT = 1_024
HEADER_BYTES_MAX = 100 << 20
FILES_MAX = 10_000
CONFIG_BYTES_MAX = 16 << 20

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz"})
CODE_SUFFIXES = frozenset({".py"})
CONFIG_NAMES = frozenset(
    {"config.json", "adapter_config.json", "params.json", "quantize_config.json", "hf_quant_config.json"}
)

_PERSON = b"kvcache.weight.1"
_POSITION_WORDS = ("rope", "rotary", "position", "alibi", "yarn", "ntk")
# Of a model's configuration: what says nothing about the numbers it computes, or is a field of its own.
_VOLATILE = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _Tensor(msgspec.Struct, frozen=True):
    data_offsets: tuple[int, int]


def digest(model: str | Path, revision: str = "", hub_cache: Path | None = None) -> str:
    """Digest of a model's weights: 32 hexadecimal digits.

    ``model`` is a directory (of a model or an adapter), one file, or a model's id, which is then looked up
    in the local cache of the Hugging Face hub at ``revision`` (empty: main). RAISES BadInput (bad_weights)
    when there is nothing that identifies weights.
    """
    root = _located(model, revision, hub_cache)
    if root.is_file():
        return _digest_files([(root.name, root)], root)
    return _digest_files(sorted(_files(root)), root)


def config_digest(config: Mapping[str, object]) -> str:
    """Digest of a configuration as the engine uses it, but for what cannot change a number.

    RAISES BadInput (bad_weights) when it holds what JSON cannot say.
    """
    return _digest_json({key: value for key, value in config.items() if key not in _VOLATILE})


def rope_digest(config: Mapping[str, object]) -> str:
    """Digest of every setting of position encoding, at any depth. RAISES BadInput (bad_weights)."""
    return _digest_json(sorted(_positions((), config), key=lambda found: found[0]))


def read_config(directory: str | Path) -> dict[str, object]:
    """``config.json`` of a model directory. RAISES BadInput (bad_weights)."""
    path = Path(directory) / "config.json"
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
        parsed = json.loads(text) if len(text) <= CONFIG_BYTES_MAX else None
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"{path} cannot be read", str(error)) from error
    if not isinstance(parsed, dict):
        raise _bad(f"{path} is no configuration", "it is too large, or no JSON object")
    return parsed


# --- finding the files --------------------------------------------------------------------------


def _located(model: str | Path, revision: str, hub_cache: Path | None) -> Path:
    path, wanted = Path(model), revision or "main"
    try:
        if path.exists():
            return path
        cache = hub_cache or _hub_cache()
        repository = cache / f"models--{str(model).replace('/', '--')}"
        reference = repository / "refs" / wanted
        snapshot = (
            repository / "snapshots" / (reference.read_text().strip() if reference.is_file() else wanted)
        )
        if snapshot.is_dir() and snapshot.parent.name == "snapshots" and ".." not in snapshot.parts:
            return snapshot
    except (OSError, ValueError) as error:
        raise _bad(f"no weights of {str(model)!r}", str(error)) from error
    raise _bad(
        f"no weights of {str(model)!r}", f"it is no path, and {cache} holds no revision {wanted!r} of it"
    )


def _hub_cache() -> Path:
    """Where the hub's own client keeps models, by its environment variables."""
    environment = os.environ
    if cache := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache)
    user_cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environment.get("HF_HOME") or Path(user_cache) / "huggingface") / "hub"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Name within ``root`` and path of each file that shapes the numbers. Hidden folders are left out."""
    found = 0
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if _counts(path):
                found += 1
                if found > FILES_MAX:
                    raise _bad(f"{root} holds over {FILES_MAX} model files", "is it a model directory?")
                yield path.relative_to(root).as_posix(), path


def _counts(path: Path) -> bool:
    suffixes = WEIGHT_SUFFIXES | CODE_SUFFIXES
    return path.suffix in suffixes or path.name in CONFIG_NAMES or path.name.endswith(".index.json")


def _refuse(error: OSError) -> None:
    raise _bad("a model directory cannot be read", str(error)) from error


# --- digesting them -----------------------------------------------------------------------------


def _digest_files(files: list[tuple[str, Path]], root: Path) -> str:
    if not any(path.suffix in WEIGHT_SUFFIXES for _, path in files):
        raise _bad(f"{root} holds no weights", f"weights are files ending in {', '.join(_SHOWN)}")
    total = blake2b(digest_size=16, person=_PERSON)
    for name, path in files:
        encoded = os.fsencode(name)
        total.update(len(encoded).to_bytes(8, "little") + encoded)
        try:
            with path.open("rb", buffering=0) as file:
                _update(total, file, path)
        except OSError as error:
            raise _bad(f"{path} cannot be read", str(error)) from error
    return total.hexdigest()


_SHOWN = sorted(WEIGHT_SUFFIXES)


def _update(total: _Hash, file: BinaryIO, path: Path) -> None:
    """Size, then each window as offset, length and content."""
    size = os.fstat(file.fileno()).st_size
    total.update(size.to_bytes(8, "little"))
    for offset, length in sorted(set(_windows(file, size, path))):
        content = os.pread(file.fileno(), length, offset)
        if len(content) != length:
            raise _bad(f"{path} changed while it was read", "it is shorter than it was")
        total.update(offset.to_bytes(8, "little") + length.to_bytes(8, "little") + content)


def _windows(file: BinaryIO, size: int, path: Path) -> Iterator[tuple[int, int]]:
    if size <= WHOLE_BYTES_MAX:
        yield 0, size
        return
    last = size - WINDOW_BYTES
    yield from ((last * number // (WINDOW_COUNT - 1), WINDOW_BYTES) for number in range(WINDOW_COUNT))
    if path.suffix == ".safetensors":
        yield from _tensor_windows(file, size)


def _tensor_windows(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """The header and the middle of every tensor; nothing when this is no safetensors file after all."""
    header_bytes = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    start = 8 + header_bytes
    if header_bytes > HEADER_BYTES_MAX or start > size:
        return
    yield 0, start
    try:
        header = msgspec.json.decode(os.pread(file.fileno(), header_bytes, 8), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = [msgspec.json.decode(entry, type=_Tensor).data_offsets for entry in header.values()]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    for begin, end in tensors:
        length = min(WINDOW_BYTES, end - begin)
        middle = start + begin + (end - begin - length) // 2
        if 0 <= begin < end and start + end <= size:
            yield middle, length


# --- configurations -----------------------------------------------------------------------------


def _positions(path: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """(where, value) of each setting whose name speaks of positions, whole below the first such name."""
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        here = (*path, str(key))
        if any(word in str(key).lower() for word in _POSITION_WORDS):
            yield here, inner
        else:
            yield from _positions(here, inner)


def _digest_json(value: object) -> str:
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad("a model's configuration cannot be digested", str(error)) from error
    return blake2b(text.encode(), digest_size=16, person=_PERSON).hexdigest()


def _bad(what: str, why: str) -> BadInput:
    todo = "name a directory with the model's weights, or give what identifies them yourself"
    return BadInput("bad_weights", what, why, todo)
