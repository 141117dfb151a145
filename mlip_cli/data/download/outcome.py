"""How a download ends that gives no picture: the words of its reject. Imports nothing heavy."""

NOT_FOUND = "not found (404)"
NO_HOST = "no such host"
NO_DNS = "no answer from DNS"
CONNECTION_FAILED = "connection failed"
HOST_SILENT = "host does not answer"
NO_CERTIFICATE = "certificate not valid"
TIMED_OUT = "timed out"
CUT_OFF = "cut off"
ASKED_TO_WAIT = "asked to wait"
REFUSED = "address refused"
NOT_AN_ADDRESS = "not an address"
CIRCLE = "redirects in a circle"
TOO_MANY_REDIRECTS = "too many redirects"
OPTED_OUT = "opted out"
TOO_LARGE = "too large"
BAD_ANSWER = "answer not understood"

RETRIED_STATUSES = frozenset((429, 500, 502, 503, 504))
CAN_PASS = frozenset(
    (
        NO_DNS,
        CONNECTION_FAILED,
        HOST_SILENT,
        TIMED_OUT,
        CUT_OFF,
        ASKED_TO_WAIT,
        *(f"HTTP {status}" for status in (408, 425, *range(500, 600))),
    )
)
"""Reasons that can be others at the next try."""
_OF_DOWNLOADS = CAN_PASS | {
    NOT_FOUND,
    NO_HOST,
    NO_CERTIFICATE,
    REFUSED,
    NOT_AN_ADDRESS,
    CIRCLE,
    TOO_MANY_REDIRECTS,
    OPTED_OUT,
    TOO_LARGE,
    BAD_ANSWER,
}


def status_words(status: int) -> str:
    """The reason of a status that is not that of a picture."""
    if status == 429:
        return ASKED_TO_WAIT
    return NOT_FOUND if status == 404 else f"HTTP {status}"


def is_of_download(reason: str) -> bool:
    """True for reasons that downloads alone give."""
    return reason in _OF_DOWNLOADS or reason.startswith("HTTP ")
