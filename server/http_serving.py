"""An HTTP address: who may ask there, bound, served, closed. For a node's HTTP process and for an index."""

from __future__ import annotations

from aiohttp import web

from kvcache.config import is_loopback, parse_bind
from kvcache.credentials import Credentials
from kvcache.errors import BadInput

SHUTDOWN_S = 1.0
BACKLOG = 128


class HttpSite:
    """One application at one address. ``close`` may be called twice."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)

    async def listen(self, host: str, port: int) -> str:
        """Returns the address, with its port if the system chose it. RAISES BadInput."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            raise BadInput(
                "address_in_use", f"http://{host}:{port} cannot be bound", str(error), "give another --http"
            ) from error
        chosen = self._runner.addresses[0][1]
        return f"http://[{host}]:{chosen}" if ":" in host else f"http://{host}:{chosen}"

    async def close(self) -> None:
        await self._runner.cleanup()


def checked_bind(bind: str, credentials: Credentials, setting: str) -> tuple[str, int]:
    """Host and port. RAISES BadInput for ``none``, and for what strangers can reach without a token."""
    address = parse_bind(bind, setting)
    if address is None:
        raise BadInput("bad_config", "no address to serve on", f"--{setting} is none", "give HOST:PORT")
    if not is_loopback(address[0]) and not credentials.has_tokens:
        raise BadInput(
            "unsafe_bind",
            f"HTTP would listen on {address[0]}, which others can reach",
            "no token is configured, so anybody could ask what is stored",
            "bind 127.0.0.1, or give --credentials with at least one token",
        )
    return address
