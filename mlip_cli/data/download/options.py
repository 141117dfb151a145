"""How pictures are downloaded. Imports nothing heavy: the command line reads the defaults."""

import re
from dataclasses import dataclass, replace
from typing import Any

from mlip_cli import __version__
from mlip_cli.errors import UsageError

USER_AGENT = f"mlip-cli/{__version__}"
CONNECT_SHARE = 0.5
"""Of the time of an attempt, what DNS, TCP and TLS may take: 10 of 20 s."""
LONGEST_CONNECT_S = 10.0
MAX_REDIRECTS = 5
ADDRESS = re.compile(r"\s*https?:/", re.IGNORECASE)
"""How a cell begins that is downloaded."""
PARTS_AT_ONCE = 8
"""Parts that a worker process has in hand. A row may take a minute with its retries, and its part ends with it."""


@dataclass(frozen=True)
class DownloadOptions:
    """What a download may take, and what it may ask for."""

    timeout_s: float = 20.0
    """For one attempt, from the name of the host to the last byte, redirects included."""
    retries: int = 2
    connections: int = 128
    connections_per_host: int = 8
    user_agent: str = USER_AGENT
    ignore_opt_out: bool = False
    allow_private: bool = False
    """Addresses of private networks and of this machine may be asked."""
    max_bytes: int = 32 << 20
    """Of one picture, also after decompression."""
    max_held_bytes: int = 128 << 20
    """Of all answers of a process that are not decoded yet; one answer alone may go beyond."""

    def __post_init__(self) -> None:
        if not self.user_agent.isascii() or not self.user_agent.isprintable() or not self.user_agent.strip():
            raise UsageError(
                f"--user-agent {self.user_agent!r}: not a line of ASCII; write a name such as {USER_AGENT}"
            )

    def in_request(self) -> dict[str, bool]:
        """What of them changes the output, and is not at its default."""
        return {name: True for name in ("ignore_opt_out", "allow_private") if getattr(self, name)}

    def shared_by(self, num_processes: int) -> "DownloadOptions":
        """The options of one of several processes. Together they keep to these, but each has a connection at least."""
        return replace(
            self,
            connections=max(1, self.connections // num_processes),
            connections_per_host=max(1, self.connections_per_host // num_processes),
        )


DEFAULTS = DownloadOptions()


def is_address(cell: Any) -> bool:
    """Whether a cell of a table is what is downloaded: an address of http or https."""
    return isinstance(cell, str) and ADDRESS.match(cell) is not None


def check_installed() -> None:
    """Check that the extra is installed.

    Raises:
        UsageError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("aiohttp") is None:
        raise UsageError(
            'pictures at addresses (https://...) are downloaded with aiohttp; pip install "mlip-cli[download]"'
        )
