"""What the headers of an answer say: the owner's wishes, and when to come back."""

import re
import time
from collections.abc import Iterable
from email.utils import parsedate_to_datetime

NOT_FOR_TRAINING = frozenset(("noai", "noimageai", "noindex", "noimageindex", "none"))
"""Directives of X-Robots-Tag that keep a picture out. `none` is short for noindex and nofollow."""
WITH_VALUES = frozenset(("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"))
"""Directives that have a colon of their own; another word before a colon names a robot."""


def opt_out(robots_tags: Iterable[str], tdm_reservation: str | None, *, user_agent: str) -> str:
    """The header by which the owner keeps the picture out, empty where there is none.

    X-Robots-Tag is a list; `NAME: noai` speaks to the robot of that name, and so do the directives that follow it.
    TDM-Reservation: 1 reserves the rights of text and data mining (W3C TDM Reservation Protocol).
    """
    token = re.split(r"[/ ]", user_agent.lower())[0]
    for value in robots_tags:
        robot = "*"
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in WITH_VALUES:
                robot, part = name.strip(), rest
            if robot in ("*", token) and part.strip() in NOT_FOR_TRAINING:
                return f"X-Robots-Tag: {value}"
    return "TDM-Reservation: 1" if tdm_reservation is not None and tdm_reservation.strip() == "1" else ""


def seconds_of(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After, which is a number or a date (RFC 9110, 10.2.3); None if it is neither."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:12])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
