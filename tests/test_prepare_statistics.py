"""Statistics of shards: numpy and Counter are the reference; they add up to the same in any order."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards_for_tests import index_shard

from mlip_cli.data.prepare import counts as counted
from mlip_cli.data.prepare.counts import Distinct, Names, added_distinct, added_names
from mlip_cli.data.prepare.histograms import BITS, Histogram, added, bins_in, bins_of, lowest
from mlip_cli.data.prepare.shards import sample_parts, tar_writer
from mlip_cli.data.prepare.statistics import NUMBERS, host_of, merged, statistics_of
from mlip_cli.errors import RunError
from mlip_cli.runs.contents import DataCard

VALUES = [np.random.default_rng(seed).lognormal(7, 2, 3_001).astype(np.int64) for seed in range(4)]


def fields(i: int) -> dict[str, Any]:
    captions = [f"thing {i} of {j}" + " and more" * (i % 5) for j in range(1 + i % 3)]
    return {
        "captions": [{"text": text, "weight": 1.0} for text in captions],
        "class": "median" if i % 3 else None,  # the name of a number of each spread
        "width": 8 + i % 4,
        "height": 8,
        "original_width": 100 + 50 * i,
        "original_height": 100,
        "source": {"file": "x", "row": i},
        "meta": {"url": f"https://Host{i % 4}.example:80/{i}.jpg", "license": "CC0"},
    }


def make_shard(path: Path, rows: range) -> Path:
    with tar_writer(path) as writer:
        for i in rows:
            image = b"RIFF....WEBP" + bytes(i)
            writer.write(sample_parts(f"{i:09d}", image=image, format="webp", fields=fields(i)))
    index_shard(path, [70 + i for i in rows])
    return path


def test_bins_follow_each_other_and_are_narrow() -> None:
    values = np.unique(np.concatenate([np.arange(9_000), 2 ** np.arange(13, 53), 2 ** np.arange(13, 53) - 1]))
    for bits in (3, BITS):
        bins = bins_of(values, bits)
        assert (np.diff(bins[:9_000]) <= 1).all()
        low, end = lowest(bins, bits), lowest(bins + 1, bits)
        assert ((low <= values) & (values < end)).all()
        assert (end - low <= np.maximum(1, low >> bits)).all()
        assert (bins_of(lowest(bins_of(values, BITS), BITS), bits) == bins).all()  # fewer bits: whole bins of more


def test_histograms_agree_with_numpy_however_they_are_added() -> None:
    values = np.concatenate(VALUES)
    whole = added([added(map(Histogram.of, VALUES[:1])), added(map(Histogram.of, VALUES[:0:-1]))])
    spread = whole.spread()
    assert (spread["min"], spread["max"]) == (values.min(), values.max())
    assert spread["mean"] == round(float(values.mean()), 3)
    assert abs(spread["median"] / np.median(values) - 1) <= 2.0 ** -(BITS + 1)
    assert whole.above(77) == (values > 77).sum()
    small = values[values < 2 << BITS]
    assert Histogram.of(small).spread()["median"] == np.median(small)
    for low, end, n in bins_in(whole.coarse(3)):
        assert n == ((low <= values) & (values < end)).sum() > 0


def test_distinct_texts_are_counted_exactly_and_then_within_the_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"caption {i % 5_000}" for i in range(12_000)]
    parts = [Distinct.of(texts[start : start + 3_000]) for start in range(0, 12_000, 3_000)]
    assert added_distinct(parts).number == 5_000
    assert added_distinct(parts).standard_error == 0
    monkeypatch.setattr(counted, "MOST_HASHES", 1_000)
    small = [Distinct.of(texts[start : start + 3_000]) for start in range(0, 12_000, 3_000)]
    estimate = added_distinct(small)
    assert estimate.standard_error == 0.0317
    assert abs(estimate.number / 5_000 - 1) < 3 * estimate.standard_error
    assert added_distinct([added_distinct(small[2:]), *small[:2]]).number == estimate.number


def test_frequent_names_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "MOST_NAMES", 50)
    random = np.random.default_rng(0)
    names = [f"rare {i}" for i in range(3_000)] + ["often"] * 900 + ["late"] * 500
    shuffled = [names[i] for i in random.permutation(len(names))]
    parts = [Names.of(shuffled[start : start + 400]) for start in range(0, len(names), 400)]
    whole = added_names(parts)
    true = Counter(names)
    assert len(whole.counts) <= 50
    assert whole.undercount <= len(names) / 51
    assert list(whole.most_common(2)) == ["often", "late"]
    for name, n in whole.counts.items():
        assert n <= true[name] <= n + whole.undercount
    assert whole.distinct.number == 3_002
    assert Names.of(["b", "a", "b", "c", "a"]).most_common(2) == {"a": 2, "b": 2}


def test_a_shard_tells_its_statistics_again_and_shards_add_up(tmp_path: Path) -> None:
    whole = statistics_of(make_shard(tmp_path / "whole.tar", range(30))).as_json()
    parts = [statistics_of(make_shard(tmp_path / f"{n}.tar", rows)) for n, rows in enumerate((range(7), range(7, 30)))]
    assert merged(parts).as_json() == merged(parts[::-1]).as_json() == whole
    captions = [caption["text"] for i in range(30) for caption in fields(i)["captions"]]
    assert whole["words"]["mean"] == round(float(np.mean([len(text.split()) for text in captions])), 3)
    assert whole["caption_characters"]["max"] == max(map(len, captions))
    assert whole["original_width"]["median"] == np.median([100 + 50 * i for i in range(30)])
    assert whole["aspect_ratio"] == pytest.approx({"min": 1.0, "median": 8.25, "mean": 8.25, "max": 15.5}, rel=5e-4)
    assert whole["share_over_77_tokens"] == round(22 / 30, 6)
    assert whole["distinct_captions"] == len(set(captions))
    assert (whole["classes"], whole["num_classes"]) == ({"median": 20}, 1)
    assert whole["domains"] == {"host0.example": 8, "host1.example": 8, "host2.example": 7, "host3.example": 7}
    assert whole["licences"] == {"CC0": 30}
    assert whole["histograms"]["captions"]["counts"] == {"1": 10, "2": 10, "3": 10}
    assert set(whole["histograms"]) == set(NUMBERS)
    json.dumps(whole, allow_nan=False)
    card = DataCard.from_json({"folder": "x", "fingerprint": "f", "num_samples": 30, "statistics": whole})
    assert set(card.spreads) == set(NUMBERS)


def test_a_damaged_json_is_named(tmp_path: Path) -> None:
    tar = make_shard(tmp_path / "0.tar", range(2))
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b'"captions":[{', b'"captions":[}'))
    with pytest.raises(RunError, match=r"0\.tar: a KEY\.json is damaged \(JSONDecodeError"):
        statistics_of(tar)


@pytest.mark.parametrize(
    ("address", "host"),
    [("https://A.example:80/x", "a.example"), ("http://[::1", None), ("x.jpg", None), (None, None), (3, None)],
)
def test_hosts(address: object, host: str | None) -> None:
    assert host_of(address) == host
