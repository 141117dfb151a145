"""Damages of prepared data, drawn at random, and what reading makes of each: a sample as it was written, or a name."""

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from shards_for_tests import make_dataset

from mlip_cli.data.dataset import BadSampleError, RawSample
from mlip_cli.data.index import HEADER, RECORD, index_path
from mlip_cli.data.open import open_prepared
from mlip_cli.data.tar import Member, read_members
from mlip_cli.errors import RunError, UsageError

WRONG = ("wrong pair", "changed pixels", "changed captions", "not named", "traceback")
Files = dict[str, bytes]
Damage = Callable[[random.Random, Files, str, list[Member]], None]
"""(generator, files by name, name of a shard, its members) -> changes the files."""


def make_whole(folder: Path) -> Path:
    """Three shards of the same size, of samples of the same size: nothing but their bytes tells them apart."""
    pictures = [Image.new("RGB", (32, 32), (10 * i, 255 - 10 * i, 90)) for i in range(24)]
    captions = [f"the picture of number {i:02d}, with some words behind" for i in range(24)]
    return make_dataset(folder, n=24, shard_size=8, captions=captions, pictures=pictures, image_format="jpg")


def _flip(generator: random.Random, content: bytes, first: int = 0) -> bytes:
    at = generator.randrange(first, len(content))
    return content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]


def _noise(generator: random.Random, content: bytes) -> bytes:
    length = generator.choice((2, 30, 512, 4096))
    at = generator.randrange(max(1, len(content) - length))
    return content[:at] + generator.randbytes(min(length, len(content) - at)) + content[at + length :]


def flipped_bit(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    files[name] = _flip(generator, files[name])


def noise(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    files[name] = _noise(generator, files[name])


def block_of_zeros(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    at = generator.randrange(len(files[name]) // 512) * 512
    files[name] = files[name][:at] + bytes(512) + files[name][at + 512 :]


def _exchange(content: bytes, a: tuple[int, int], b: tuple[int, int]) -> bytes:
    (low, low_end), (high, high_end) = sorted((a, b))
    pieces = content[:low], content[high:high_end], content[low_end:high], content[low:low_end], content[high_end:]
    return b"".join(pieces)


def _pair(generator: random.Random, members: list[Member]) -> tuple[Member, Member]:
    """Two members of one kind and size, of different samples."""
    while True:
        a, b = generator.sample(members, 2)
        if a.size == b.size and a.name.rpartition(".")[2] == b.name.rpartition(".")[2]:
            return a, b


def exchanged_contents(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    a, b = _pair(generator, members)
    files[name] = _exchange(files[name], (a.offset, a.offset + a.size), (b.offset, b.offset + b.size))


def exchanged_headers(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    a, b = _pair(generator, members)
    files[name] = _exchange(files[name], (a.offset - 512, a.offset), (b.offset - 512, b.offset))


def exchanged_members(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    a, b = _pair(generator, members)
    files[name] = _exchange(files[name], (a.offset - 512, a.offset + a.size), (b.offset - 512, b.offset + b.size))


def exchanged_samples(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    groups = [members[at : at + 3] for at in range(0, len(members), 3)]
    spans = [(group[0].header_offset, group[-1].offset + group[-1].size) for group in groups]
    a, b = generator.sample(spans, 2)
    files[name] = _exchange(files[name], a, b)


def shortened_caption(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    """JSON that is still whole, with fewer words in it."""
    member = generator.choice([member for member in members if member.name.endswith(".json")])
    own = files[name][member.offset : member.offset + member.size]
    cut = own.replace(b", with some words behind", b"", 1).ljust(member.size)
    files[name] = files[name][: member.offset] + cut + files[name][member.offset + member.size :]


def tar_of_another_shard(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    other = generator.choice([known for known in files if known.endswith(".tar") and known != name])
    files[name], files[other] = files[other], files[name]


def _index(name: str) -> str:
    return index_path(Path(name)).name


def index_of_another_shard(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    other = generator.choice([known for known in files if known.endswith(".idx") and known != _index(name)])
    files[_index(name)] = files[other]


def damaged_index(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    change = generator.choice((_flip, _noise))
    files[_index(name)] = change(generator, files[_index(name)])


def record_that_changed_in_memory(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    """The checksum of the whole index is right, as if the damage came after the check."""
    content = _flip(generator, files[_index(name)], HEADER.itemsize)
    header = np.frombuffer(content, HEADER, count=1).copy()
    header["crc32"] = zlib.crc32(content[HEADER.itemsize :])
    files[_index(name)] = header.tobytes() + content[HEADER.itemsize :]


def record_of_another_sample(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    records = np.frombuffer(files[_index(name)], RECORD, offset=HEADER.itemsize).copy()
    a, b = sorted(generator.sample(range(len(records)), 2))
    for part in generator.choice((("image",), ("json",), ("image", "json"))):
        records[f"{part}_offset"][a] += int(records["offset"][b]) - int(records["offset"][a])
    header = np.frombuffer(files[_index(name)], HEADER, count=1).copy()
    header["crc32"] = zlib.crc32(records.tobytes())
    files[_index(name)] = header.tobytes() + records.tobytes()


def card_of_another_shard(generator: random.Random, files: Files, name: str, members: list[Member]) -> None:
    card = json.loads(files["dataset.json"])
    a, b = generator.sample(range(len(card["shards"])), 2)
    shards = card["shards"]
    shards[a]["name"], shards[b]["name"] = shards[b]["name"], shards[a]["name"]
    files["dataset.json"] = json.dumps(card).encode()


DAMAGES: tuple[Damage, ...] = (
    flipped_bit,
    noise,
    block_of_zeros,
    exchanged_contents,
    exchanged_headers,
    exchanged_members,
    exchanged_samples,
    shortened_caption,
    tar_of_another_shard,
    index_of_another_shard,
    damaged_index,
    record_that_changed_in_memory,
    record_of_another_sample,
    card_of_another_shard,
)


def outcomes(whole: Path, work: Path, damage: Damage, *, trials: int, seed: int) -> Counter[str]:
    """Damage the data `trials` times, each time anew, and count what became of the samples."""
    generator, found = random.Random(f"{seed} {damage.__name__}"), Counter[str]()
    originals = {path.name: path.read_bytes() for path in sorted(whole.iterdir())}
    dataset = open_prepared(whole)
    expected = [dataset.read(id) for id in range(dataset.num_samples)]
    dataset.close()
    members = {name: list(read_members(whole / name)) for name in originals if name.endswith(".tar")}
    work.mkdir()
    for _ in range(trials):
        files, name = dict(originals), generator.choice(list(members))
        damage(generator, files, name, members[name])
        for file, content in files.items():
            (work / file).write_bytes(content)
        found += _outcome(work, expected)
    return found


def _outcome(work: Path, expected: list[RawSample]) -> Counter[str]:
    try:
        dataset = open_prepared(work)
    except (RunError, UsageError) as error:
        is_named = any(f"{work / path.name}: " in str(error) for path in work.iterdir())
        return Counter({"refused when opened" if is_named else "not named": 1})
    found: Counter[str] = Counter()
    for id, own in enumerate(expected):
        try:
            found[_kind(dataset.read(id), own)] += 1
        except BadSampleError as error:
            is_named = error.shard.startswith(f"{work}/train-") and error.key and error.reason
            found["named" if is_named else "not named"] += 1
        except Exception:  # noqa: BLE001 - that there are none is what is tested
            found["traceback"] += 1
    dataset.close()
    if set(found) == {"as written"}:  # padding, or KEY.txt, which nobody reads
        found["damages of unread bytes"] += 1
    return found


def _kind(sample: RawSample, own: RawSample) -> str:
    if sample.key != own.key:
        return "wrong pair" if sample.captions != own.captions and sample.image == own.image else "not named"
    if sample.image != own.image:
        return "changed pixels"
    return "as written" if sample.captions == own.captions else "changed captions"
