"""A damaged sample never trains: whatever happened to shards, indexes or cards, it is named."""

from pathlib import Path

import numpy as np
import pytest
from damages_for_tests import DAMAGES, WRONG, Damage, make_whole, outcomes
from shards_for_tests import make_dataset

from mlip_cli.data import dataset as module
from mlip_cli.data.index import HEADER, INDEX_MAGIC, RECORD, WITHOUT_CHECKSUMS, index_path
from mlip_cli.data.open import open_prepared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole(tmp_path_factory.mktemp("whole") / "train")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_is_named(whole: Path, tmp_path: Path, damage: Damage) -> None:
    found = outcomes(whole, tmp_path / "train", damage, trials=25, seed=0)
    assert {kind: n for kind, n in found.items() if kind in WRONG} == {}
    assert found["named"] + found["refused when opened"] > 0


def test_an_index_of_the_first_format_is_read_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset(tmp_path / "x", n=12, shard_size=4)
    expected = [open_prepared(folder).read(id) for id in range(12)]
    for shard in folder.glob("*.tar"):
        content = index_path(shard).read_bytes()
        header = np.frombuffer(content, HEADER, count=1).copy()
        records = np.frombuffer(content, RECORD, offset=HEADER.itemsize).copy()
        assert header["magic"] == INDEX_MAGIC
        header["magic"], header["crc32"], records["crc32"] = WITHOUT_CHECKSUMS, 0, 32 << 16 | 32  # height and width
        index_path(shard).write_bytes(header.tobytes() + records.tobytes())
    said: list[str] = []
    monkeypatch.setattr(module, "warn", said.append)
    dataset = open_prepared(folder)
    assert [dataset.read(id) for id in range(12)] == expected
    assert said == [
        f"{folder}: this data set was prepared before samples had checksums, so a damaged sample may be trained on; "
        "prepare it again"
    ]
