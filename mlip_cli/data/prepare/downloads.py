"""What prepare-data says about downloads, and when so many fail that it stops."""

import os
from collections import Counter

from mlip_cli.data.download.options import DownloadOptions
from mlip_cli.data.download.outcome import (
    CONNECTION_FAILED,
    HOST_SILENT,
    NO_DNS,
    NO_HOST,
    REFUSED,
    TIMED_OUT,
    is_of_download,
)
from mlip_cli.terminal.output import plural, say, warn

MOST_ALIKE = 0.5
"""When more of the first rows fail for one reason, a wrong column or folder is read."""
MOST_DOWNLOADS_ALIKE = 0.95
"""For reasons of downloads: half of an old list is gone, and that is no mistake."""
MOST_OUTCOMES = 3
"""Reasons that the progress line counts, the most frequent ones."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_OFFLINE = "is this machine on the network? Proxies of the environment are not used"
CURES = {
    REFUSED: "if these are servers of your own network, say --allow-private",
    **dict.fromkeys((CONNECTION_FAILED, HOST_SILENT, NO_DNS, NO_HOST, TIMED_OUT), _OFFLINE),
}
"""What helps where almost all downloads fail for a reason."""


def shared_by(num_workers: int, options: DownloadOptions, *, pictures: str) -> DownloadOptions:
    """What one worker may take. Says what is downloaded (`pictures`, a number in words), and how."""
    own = options.shared_by(num_workers)
    wishes = "" if options.ignore_opt_out else "; pictures whose owner opts out are left out"
    say(
        f"{pictures} to download: at most {plural(num_workers * own.connections, 'connection')}, "
        f"{num_workers * own.connections_per_host} to a host, {options.timeout_s:g} s a try, "
        f"{plural(options.retries, 'retry', 'retries')}{wishes}"
    )
    for name in PROXIES:
        if os.environ.get(name) or os.environ.get(name.lower()):
            warn(f"{name} is not used: a proxy looks names up itself, so nobody would check where they lead")
            break
    return own


def most_alike(reason: str, *, is_first: bool) -> float:
    """The share of rows that may fail for a reason. At the end, downloads that failed never spoil the others."""
    if not is_of_download(reason):
        return MOST_ALIKE
    return MOST_DOWNLOADS_ALIKE if is_first else 1.0


def outcomes_in_words(num_rows: int, reasons: Counter[str]) -> str:
    """`1,203 samples, 45 not found (404), 12 timed out`, of so many rows."""
    num_rejects = reasons.total()
    most = reasons.most_common(MOST_OUTCOMES)
    words = [plural(num_rows - num_rejects, "sample")]
    words += [f"{n:,} {reason}" for reason, n in most]
    others = num_rejects - sum(n for _, n in most)
    return ", ".join([*words, f"{plural(others, 'other reject')}"] if others else words)
