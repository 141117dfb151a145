"""Which samples show the same concept, as a number that travels with a batch."""

import hashlib
from typing import Any


def label_of(record: dict[str, Any], caption: str) -> int:
    """63 bits that stand for the record's concept (`concept` of its meta), or for the caption where it names none.

    Equal for equal values in every process and version; a concept never equals a caption. Captions are compared without
    case and spacing, which their tokens do not show either.
    """
    meta = record.get("meta")
    concept = meta.get("concept") if isinstance(meta, dict) else None
    kind, value = ("caption", " ".join(caption.lower().split())) if concept in (None, "") else ("concept", concept)
    text = f"{kind}\0{value}".encode(errors="surrogatepass")  # JSON may hold halves of surrogate pairs
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
