"""rejects.parquet: the rows that are no samples, in the order of the source, each with its reason."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlip_cli.data.prepare.part_tables import blocks
from mlip_cli.data.prepare.plan import Plan
from mlip_cli.data.prepare.shards import open_part, start_again
from mlip_cli.errors import RunError
from mlip_cli.files import atomic_path
from mlip_cli.paths import escaped

REJECT = np.dtype(
    [
        ("place", "<u8"),  # in the whole source
        ("part", "<u4"),  # whose rejects hold it; without a meaning for a row that pass 2 drops
        ("line", "<u8"),  # of the part's rejects, or the place of the row in the plan
        ("code", "u1"),  # of `Drops`; 0: the row did not pass pass 1
    ]
)
FIELDS = {"place": int, "file": str, "row": int, "reason": str, "detail": str}
"""Of a line of a part's rejects."""
BATCH = 4096
"""Rows that are in memory at a time."""


def write_rejects(path: Path, plan: Plan) -> None:
    """Write the rejects of the parts, and the rows that the plan drops. A whole file that is there is kept.

    Raises:
        RunError: a part that holds a dropped row is gone.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = _found(plan)
    if path.is_file() and pq.read_metadata(path).num_rows == len(found):
        return
    schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])
    lines = lru_cache(maxsize=4)(rejects_of)  # those of parts whose rows lie between each other's
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for block in blocks(len(found), BATCH):
            rejects = [
                _dropped(plan, line) if code else lines(plan.tables.tars[part])[line]
                for _, part, line, code in found[block].tolist()
            ]
            writer.write_table(pa.Table.from_pylist(rejects, schema=schema))


def rejects_of(tar: Path) -> list[dict[str, Any]]:
    """place (in the whole source), file, row, reason and detail of each reject of the part with this tar.

    Raises:
        RunError: they are gone, or not as they were written.
    """
    path = tar.with_suffix(".rejects.jsonl")
    try:
        rejects = list(map(json.loads, path.read_bytes().splitlines()))
        is_whole = all({name: type(value) for name, value in reject.items()} == FIELDS for reject in rejects)
    except (FileNotFoundError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise RunError(f"{path}: gone, or changed since it was written; {start_again(tar)}")
    return rejects


def reject_places(plan: Plan) -> NDArray[np.uint64]:
    """(n,): the place in the whole source of each row of rejects.parquet."""
    places: NDArray[np.uint64] = _found(plan)["place"].copy()
    return places


def _found(plan: Plan) -> NDArray[np.void]:
    """(n,) of REJECT, in the order of the source."""
    rows = np.flatnonzero(plan.fates.drops.codes)
    dropped = np.zeros(len(rows), REJECT)
    dropped["line"], dropped["code"] = rows, plan.fates.drops.codes[rows]
    if len(rows):
        dropped["place"] = plan.tables["row"][rows]
    of_parts = [dropped]
    for part, tar in enumerate(plan.tables.tars):
        places = [reject["place"] for reject in rejects_of(tar)]
        own = np.zeros(len(places), REJECT)
        own["place"], own["part"], own["line"] = places, part, np.arange(len(places))
        of_parts.append(own)
    found = np.concatenate(of_parts)
    return found[np.argsort(found["place"], kind="stable")]


def _dropped(plan: Plan, row: int) -> dict[str, Any]:
    """The reject of a sample that was stored; its KEY.json says where it comes from."""
    source = _source_of(plan, row)
    drops, twin = plan.fates.drops, plan.fates.twin_in_set(row)
    if twin is None:
        other = _source_of(plan, int(drops.twins[row]))
        twin = f"{escaped(other['file'])} row {other['row']}"
    return {
        "file": escaped(source["file"]),
        "row": source["row"],
        "reason": drops.words[drops.codes[row]],
        "detail": f"{plan.fates.how(row)}as {twin}",
    }


def _source_of(plan: Plan, row: int) -> dict[str, Any]:
    """`source` of KEY.json of a sample: file and row."""
    tar, record = plan.tables.place(row)
    with open_part(tar) as descriptor:
        content = os.pread(descriptor, int(record["json_size"]), int(record["offset"]) + int(record["json_offset"]))
    source: dict[str, Any] = json.loads(content)["source"]
    return source
