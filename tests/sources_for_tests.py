"""Small sources of real pictures, and prepare-data in this process."""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from mlip_cli.commands.prepare_data import prepare_data
from mlip_cli.data.prepare.engines import Engine
from mlip_cli.data.prepare.filters import Cleaning
from mlip_cli.data.prepare.job import Asked
from mlip_cli.data.sources.records import ReadOptions

COLORS = ("red", "green", "blue", "orange", "black", "purple")


def picture(i: int, format: str = "PNG") -> bytes:
    """A picture of 12 x 9 pixels, different for every i below 60,000."""
    image = Image.new("RGB", (12, 9), COLORS[i % len(COLORS)])
    image.putpixel((0, 0), (i // 256, i % 256, 0))
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write `files` by name under `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_sidecars(folder: Path, n: int) -> Path:
    """`n` PNG pictures with a caption beside each."""
    files: dict[str, bytes | str] = {}
    for i in range(n):
        files[f"{i:05d}.png"], files[f"{i:05d}.txt"] = picture(i), f"picture number {i}\n"
    return write_files(folder, files)


def write_tar(path: Path, members: Mapping[str, bytes | str], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def asked(source: Path | str, out: Path | str, **options: Any) -> Asked:
    """What the command is asked for; `options` are fields of Asked, Engine, Cleaning and ReadOptions."""
    options = {"holdout": 0.0, "workers": 1, **options}
    engine = Engine(options.pop("engine", "processes"), options.pop("workers"))
    cleaning, read = (
        kind(**{own.name: options.pop(own.name) for own in fields(kind) if own.name in options})
        for kind in (Cleaning, ReadOptions)
    )
    return Asked(**{"cleaning": cleaning, **options}, source=str(source), out=str(out), read=read, engine=engine)


def prepare(source: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    """Run the command. Returns what prepared.json holds."""
    prepare_data(asked(source, out, **options), as_json=True)
    return json.loads((out / "prepared.json").read_bytes())


def samples(out: Path, split: str = "train") -> list[dict[str, Any]]:
    """KEY.json of each sample of a split with `key`, `txt` and the picture's `image` and `format`."""
    found: dict[str, dict[str, Any]] = {}
    for shard in sorted((out / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, ending = member.name.split(".")
                content = tar.extractfile(member).read()
                sample = found.setdefault(key, {"key": key})
                if ending == "json":
                    sample |= json.loads(content)
                else:
                    sample |= {"txt": content.decode()} if ending == "txt" else {"image": content, "format": ending}
    return list(found.values())


def texts(out: Path, split: str = "train") -> list[list[str]]:
    """Captions of each sample of a split."""
    return [[caption["text"] for caption in sample["captions"]] for sample in samples(out, split)]


def rejects(out: Path) -> list[tuple[str, int, str, str]]:
    """(file, row, reason, detail) of each reject."""
    return [tuple(row.values()) for row in pq.read_table(out / "rejects.parquet").to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a finished folder but the summary and the card, which say how long it took and where."""
    named = ("prepared.json", "card.html")
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in named)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
