"""The connector's settings: ``kv_connector_extra_config`` of vLLM's ``--kv-transfer-config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from kvcache.address import parse
from kvcache.errors import BadInput


@dataclass(frozen=True, slots=True)
class Settings:
    """All optional. RAISES BadInput (``from_extra_config``) for keys and values that are not these."""

    address: str = ""
    """Where the node listens; empty: the default socket."""
    token_file: str = ""
    """A file whose first line is the token; empty: the uid is the credential."""
    model: str = ""
    """The model's name in the namespace; empty: as vLLM was told. Give it when paths differ between hosts."""
    weights: str = ""
    """What identifies the weights; empty: a digest of the model's files."""
    epoch: int = 0
    """Raised when weights change in place: what was stored before is not found any more."""
    lookup_timeout_ms: int = 30
    """How long the engine's scheduler may wait for the store's answer; the engine stands meanwhile."""
    move_timeout_ms: int = 1_000
    """How long a load or save waits for the store, beside the engine."""
    load_wait_ms: int = 2_000
    """How long a request waits, at most, for blocks that the node reads from NVMe or that come from another
    node; others go on meanwhile."""
    promise_wait_ms: int = 500
    """How long of that a request waits for blocks of which only its router says that they are coming."""
    save_generated: bool = True
    """Save the blocks of generated tokens too, not only of prompts."""
    hbm: bool = False
    """Load what is in HBM, and save into it; the node must have some (``hbm``), and run on this host. On CUDA
    that is always so."""
    cuda: bool = False
    """Serve an engine on CUDA, which was tested with tensors on the CPU and a double of the driver alone."""
    layer_streaming: bool = True
    """Give a prompt that another engine will decode to the node layer by layer, while it is computed."""

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, object]) -> Settings:
        known = {field.name: type(getattr(cls(), field.name)) for field in fields(cls)}
        for key, value in extra.items():
            if key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise BadInput(
                    "bad_config", f"kv_connector_extra_config has {key!r}", "no such setting", hint
                )
            if type(value) is not known[key]:
                raise BadInput(
                    "bad_config",
                    f"{key} in kv_connector_extra_config is {value!r}",
                    f"it is a {known[key].__name__}",
                )
        settings = cls(**dict(extra))  # type: ignore[arg-type]  # each value's type was just compared
        if settings.address:
            parse(settings.address)
        for name in ("lookup_timeout_ms", "move_timeout_ms"):
            if getattr(settings, name) < 1:
                raise BadInput("bad_config", f"{name} is {getattr(settings, name)}", "it is at least 1")
        for name in ("load_wait_ms", "promise_wait_ms"):
            if getattr(settings, name) < 0:
                raise BadInput("bad_config", f"{name} is {getattr(settings, name)}", "it is at least 0")
        return settings

    @property
    def token(self) -> str:
        """RAISES BadInput when the token file cannot be read."""
        if not self.token_file:
            return ""
        try:
            lines = Path(self.token_file).read_text().splitlines()
        except OSError as error:
            raise BadInput("bad_credentials", f"the token file {self.token_file}", str(error)) from error
        return lines[0].strip() if lines else ""
