"""Statistics of the samples of a shard, of fixed size, and of a split, which are those of its shards added up."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import FORMATS, index_path, read_checked
from mlip_cli.data.prepare.counts import Distinct, Names, added_distinct, added_names
from mlip_cli.data.prepare.histograms import Histogram, added
from mlip_cli.errors import RunError

CONTEXT_LENGTH = 77
"""Of the published CLIP models. dataset.json says how many captions are longer."""
TOKENS = "longest_caption_tokens"
TRUNCATED = f"share_over_{CONTEXT_LENGTH}_tokens"
MOST_LISTED = 100
"""So many classes, hosts and licences stand in dataset.json."""


@dataclass(frozen=True)
class Number:
    """A number that is counted."""

    bits: int
    """Of its histogram in dataset.json (see `histograms`)."""
    scale: int = 1
    """It is counted in whole parts of 1 / scale."""


NUMBERS = {
    "width": Number(5),
    "height": Number(5),
    "original_width": Number(5),
    "original_height": Number(5),
    "aspect_ratio": Number(5, scale=8_192),
    "image_bytes": Number(5),
    "captions": Number(6),
    "words": Number(6),
    "caption_characters": Number(5),
    TOKENS: Number(6),
}
"""The numbers of a picture or a caption, in the order of dataset.json. `words` and `caption_characters` are those of
each caption, `longest_caption_tokens` of each picture, `aspect_ratio` original width by original height."""


@dataclass(frozen=True)
class ShardStatistics:
    """What dataset.json tells of some samples, at least one. Its size does not grow with their number."""

    histograms: Mapping[str, Histogram]
    """By the names of NUMBERS."""
    captions: Distinct
    formats: Mapping[str, int]
    names: Mapping[str, Names]
    """`classes`, `domains` (hosts of picture addresses) and `licences`."""

    def as_json(self) -> dict[str, Any]:
        """The `statistics` of dataset.json."""
        spreads = {name: own.spread(scale=NUMBERS[name].scale) for name, own in self.histograms.items()}
        tokens = self.histograms[TOKENS]
        return {
            **spreads,
            "distinct_captions": self.captions.number,
            "distinct_captions_standard_error": self.captions.standard_error,
            TRUNCATED: round(tokens.above(CONTEXT_LENGTH) / tokens.n, 6),
            "formats": dict(sorted(self.formats.items())),
            **{f"num_{name}": own.distinct.number for name, own in self.names.items()},
            **{name: dict(sorted(own.most_common(MOST_LISTED).items())) for name, own in self.names.items()},
            "undercounts": {name: own.undercount for name, own in self.names.items()},
            "histograms": {
                name: own.coarse(NUMBERS[name].bits, scale=NUMBERS[name].scale) for name, own in self.histograms.items()
            },
        }


def statistics_of(tar: Path, records: NDArray[np.void] | None = None) -> ShardStatistics:
    """The statistics of a shard that mlip wrote, by reading it.

    Args:
        records: (n,) of RECORD, with n > 0; None: those of the index beside the tar.

    Raises:
        RunError: the index is damaged, or a KEY.json is.
    """
    records = read_checked(index_path(tar))[1] if records is None else records
    values: dict[str, list[int]] = {name: [] for name in NUMBERS if name not in ("image_bytes", "captions", TOKENS)}
    texts: list[str] = []
    names: dict[str, list[str]] = {"classes": [], "domains": [], "licences": []}
    try:
        with open(tar, "rb") as file:
            for start, at, size in records[["offset", "json_offset", "json_size"]].tolist():
                fields = json.loads(os.pread(file.fileno(), size, start + at))
                own = [caption["text"] for caption in fields["captions"]]
                _add_numbers(values, fields, own)
                texts += own
                _add_names(names, fields)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{tar}: a KEY.json is damaged ({error!r}); is the disk sound?") from None
    arrays = {name: np.array(own, np.int64) for name, own in values.items()}
    of_records = {"image_bytes": "image_size", "captions": "num_captions", TOKENS: "num_tokens"}
    arrays |= {name: records[field].astype(np.int64) for name, field in of_records.items()}
    return ShardStatistics(
        {name: Histogram.of(arrays[name]) for name in NUMBERS},
        Distinct.of(texts),
        Counter(FORMATS[code] for code in records["format"].tolist()),
        {name: Names.of(own) for name, own in names.items()},
    )


def merged(parts: Iterable[ShardStatistics]) -> ShardStatistics:
    """The statistics of all samples of the parts. It holds two parts at a time."""
    remaining = iter(parts)
    sum_ = next(remaining)
    for part in remaining:
        sum_ = ShardStatistics(
            {name: added([sum_.histograms[name], part.histograms[name]]) for name in NUMBERS},
            added_distinct([sum_.captions, part.captions]),
            Counter(sum_.formats) + Counter(part.formats),
            {name: added_names([own, part.names[name]]) for name, own in sum_.names.items()},
        )
    return sum_


def _add_numbers(values: Mapping[str, list[int]], fields: Mapping[str, Any], texts: Iterable[str]) -> None:
    for name in ("width", "height", "original_width", "original_height"):
        values[name].append(fields[name])
    ratio = fields["original_width"] * NUMBERS["aspect_ratio"].scale / fields["original_height"]
    values["aspect_ratio"].append(round(ratio))
    for text in texts:
        values["words"].append(len(text.split()))
        values["caption_characters"].append(len(text))


def _add_names(names: Mapping[str, list[str]], fields: Mapping[str, Any]) -> None:
    source, meta = fields.get("source") or {}, fields.get("meta") or {}
    if fields.get("class") is not None:
        names["classes"].append(fields["class"])
    host = host_of(source.get("url") or meta.get("url") or meta.get("URL"))
    if host:
        names["domains"].append(host)
    licence = meta.get("license") or meta.get("LICENSE") or meta.get("licence")
    if licence:
        names["licences"].append(str(licence))


def host_of(address: object) -> str | None:
    """`https://A.example:80/x.jpg` -> a.example; None for what is not such an address."""
    try:
        return urlsplit(address).hostname or None if isinstance(address, str) else None
    except ValueError:
        return None
