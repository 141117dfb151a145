"""An open tar and its index: the bytes of a sample, checked before anyone uses them."""

import os
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.index import FORMATS, Place, checksum
from mlip_cli.data.sources.tar_samples import FIELDS_OF, ending_of, key_and_field
from mlip_cli.data.tar import BLOCK, Member, Read, walk
from mlip_cli.paths import escaped

MAX_GAP_BYTES = 1 << 18
"""A sample of a tar that mlip did not write is read in one go, unless more bytes than these lie between its parts."""
HEADER_BYTES = 8 * BLOCK
"""Room for the PAX or long-name headers of the last part in that one go; where they are longer, it is read again."""


@dataclass(frozen=True)
class OpenShard:
    descriptor: int
    num_bytes: int
    records: NDArray[np.void]
    has_checksums: bool
    at_first_dot: bool
    """Where the keys of its samples end."""


def read_parts(shard: OpenShard, record: np.void, place: Place) -> tuple[str, dict[str, bytes], bool]:
    """Key of a sample, the bytes of its parts, and whether its checksum is right, if it has one.

    Raises:
        ValueError: what lies there is not what the index says.
        OSError: the disk cannot be read.
    """
    if place.end > shard.num_bytes:
        raise ValueError("the index places it behind the end of the shard")
    if "image" not in place.parts:
        raise ValueError("the index places no picture")
    if place.format >= len(FORMATS):
        raise ValueError(f"the index names picture format {place.format}; formats are 0 to {len(FORMATS) - 1}")
    if not shard.has_checksums:
        return *_parts_by_headers(shard, place), True
    content = _read_whole(shard.descriptor, place.end - place.start, place.start)
    if checksum(record, content) != place.crc32:
        return *_parts_by_headers(shard, place), False
    parts = {}
    for part, (header, size) in place.parts.items():
        at = header + BLOCK - place.start
        parts[part] = content[at : at + size]
    at = place.parts["image"][0] - place.start
    name = content[at : at + 100].partition(b"\0")[0].decode()
    return name.rpartition(".")[0], parts, True


def _parts_by_headers(shard: OpenShard, place: Place) -> tuple[str, dict[str, bytes]]:
    """Key of a sample and the bytes of its parts, each checked against its header in the tar.

    Raises:
        ValueError: what lies there is not what the index says.
        OSError: the disk cannot be read.
    """
    read: Read = partial(_read_whole, shard.descriptor)
    if place.end - place.start <= MAX_GAP_BYTES + sum(size for _, size in place.parts.values()):
        read = _Window(shard.descriptor, place.start, place.end + HEADER_BYTES - place.start)
    keys, contents = set(), {}
    for part, (header, size) in place.parts.items():
        member = next(walk(read, length=shard.num_bytes, start=header), None)
        keys.add(_checked_key(member, part, size, at_first_dot=shard.at_first_dot))
        contents[part] = read(size, member.offset) if member else b""
    if len(keys) != 1:
        raise ValueError(f"its parts belong to {' and '.join(sorted(map(escaped, keys)))}")
    return escaped(keys.pop()), contents


def _read_whole(descriptor: int, size: int, at: int) -> bytes:
    content = os.pread(descriptor, size, at)
    if len(content) != size:
        raise ValueError(f"the shard ends {size - len(content)} bytes too early")
    return content


class _Window:
    """Some bytes of a tar, read at once; what lies outside is read when it is asked for."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self.descriptor, self.start = descriptor, start
        self.content = os.pread(descriptor, size, start)

    def __call__(self, size: int, at: int) -> bytes:
        found = self.content[at - self.start : at - self.start + size]
        return found if len(found) == size else _read_whole(self.descriptor, size, at)


def _checked_key(member: Member | None, part: str, size: int, *, at_first_dot: bool) -> str:
    """Key of the member at the place of a part; ValueError where it is not what the index says."""
    endings = FIELDS_OF[part]
    if member is None:
        raise ValueError(f"no member begins where the index places .{endings[0]}")
    key, field = key_and_field(member.name, at_first_dot=at_first_dot)
    if member.size != size or not member.is_file or ending_of(field) not in endings:
        name = escaped(member.name)
        raise ValueError(f"{name!r} of {member.size} bytes where the index says .{endings[0]} of {size}")
    return key
