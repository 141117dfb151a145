"""card.html: what stands on it is what was counted, text from outside is text, and it never costs the data."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from browser_for_tests import Browser
from PIL import Image
from sources_for_tests import picture, prepare, write_files, write_sidecars

from mlip_cli.data.prepare.examples import MOST_EXAMPLES, examples_of
from mlip_cli.data.prepare.summary import Summary
from mlip_cli.report.data_card import data_card
from mlip_cli.report.data_charts import bins_of_all, cut_off, log_chart

EVIL = (
    '<script>alert("1")</script> disc',
    '"><img src=x onerror=alert(2)> & $x^2$ square',
    "abc \u202egnp.exe\u202c \u2066x",
    "日本 é مرحبا",
    "word " * 90,
    '\' onmouseover=alert(3) " onmouseover="alert(4)',
    "w" * 60_000,
)
MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with texts of markup in captions, names of files, classes, hosts and licences."""
    folder = tmp_path_factory.mktemp("card")
    texts = {"license": '<u>"CC0"'}
    rows = [
        texts | {"file_name": f"<b>{i}.png", "text": EVIL[i % len(EVIL)], "url": f"https://<i>host{i % 3}.example/{i}"}
        for i in range(30)
    ]
    files: dict[str, bytes | str] = {f"<b>{i}.png": picture(i) for i in range(28)} | {"<b>28.png": "not a picture"}
    files["metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    prepare(write_files(folder / "in<i>", files), folder / "out", holdout=0.3)
    return folder / "out"


def test_the_card_shows_what_was_counted(out: Path) -> None:
    page = (out / "card.html").read_text("utf-8")
    summary = Summary.read(out / "prepared.json")
    text = " ".join(re.sub("<[^>]*>", " ", page.partition("</style>")[2]).split())
    assert "pictures 30 samples 28 (93.3 %) rejects 2 (6.7 %)" in text
    assert "not a picture 1 (3.3 %) picture missing 1 (3.3 %)" in text
    assert all(split.fingerprint in text for split in summary.splits.values())
    assert "&lt;i&gt;host0.example 10 (35.7 %)" in text
    assert "&lt;u&gt;&quot;CC0&quot; 28" in text
    assert "77 tokens, where CLIP cuts" in text
    assert re.search(
        r"train/: [\d.]+ % of the pictures have a caption of more than 77 tokens; 7 distinct captions", text
    )
    assert f"mlip prepare-data --check {out}" in text
    assert page.count("data:image/webp") == MOST_EXAMPLES
    assert len(page.encode()) < MOST_BYTES


def test_text_from_outside_is_text(out: Path) -> None:
    page = (out / "card.html").read_text("utf-8")
    assert not re.search("<(script|b>|i>|u>|img src=x)", page)
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page)
    assert "abc \\u202egnp.exe\\u202c" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_card_and_fetches_nothing(out: Path, chromium: Browser, width: int, scheme: str) -> None:
    chromium.open(out / "card.html", width=width, scheme=scheme)
    chromium.evaluate("Promise.all([...document.images].map(image => image.decode())).then(() => 0)")
    asked = [address for address in chromium.requested() if not address.startswith("data:image/")]
    assert asked == [(out / "card.html").resolve().as_uri()]
    assert chromium.complaints() == []
    assert (
        chromium.evaluate("document.scripts.length + document.querySelectorAll('[onerror], [onmouseover]').length") == 0
    )
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert chromium.evaluate("document.querySelectorAll('svg').length") >= 6


def test_duplicates_are_counted_from_their_reasons(out: Path) -> None:
    summary = Summary.read(out / "prepared.json")
    reasons = {"duplicate: same bytes": 3, "duplicate: same pixels": 1, "picture missing": 2}
    fields = summary.__dict__ | {"reasons": reasons, "rejects": 6, "pictures": 34}
    page = data_card(Summary(**fields), {}, [], written="now")
    assert "4 duplicates dropped." in page
    assert "An earlier version prepared this data; it wrote no histograms." in page


def test_what_the_card_says_of_splits_and_options(out: Path) -> None:
    summary = Summary.read(out / "prepared.json")
    request = summary.request | {"exclude": ["folder:a", "shards:b"], "allow_private": True}
    splits = {"test": replace(summary.splits["train"], holds="the hard part")}
    fields = summary.__dict__ | {"request": request, "splits": splits, "held_out": True}
    cards = {"test": {"provenance": {"list": "A list (of somebody)", "licence": "list: CC BY 4.0"}}}
    page = data_card(Summary(**fields), cards, [], written="now")
    assert "<dt>exclude</dt><dd>folder:a, shards:b</dd><dt>allow private</dt><dd>yes</dd>" in page
    assert "<dt>list</dt><dd>A list (of somebody)</dd><dt>licence</dt><dd>list: CC BY 4.0</dd>" in page
    assert "test/ holds the hard part." in page
    assert "validation/ was drawn by the hash of the pixels." in page
    ids = re.findall('<section id="([a-z]+)">', page)
    assert ids == ["counts", "examples", "pictures", "captions", "made"]


def test_a_card_that_is_gone_is_written_again_and_is_the_same(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, again = write_sidecars(tmp_path / "in", 4), tmp_path / "again"
    prepare(source, again)
    first = (again / "card.html").read_bytes()
    (again / "card.html").unlink()
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(source, again)
    assert (again / "card.html").read_bytes() == first
    assert f"card: {again / 'card.html'}" in caplog.messages


def test_a_failure_of_the_card_is_told_and_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, made = write_sidecars(tmp_path / "in", 4), tmp_path / "made"
    summary = prepare(source, made)
    (made / "card.html").unlink()
    (made / "card.html").mkdir()
    assert prepare(source, made) == summary
    (told,) = [record for record in caplog.records if record.levelname == "WARNING" and "card.html" in record.message]
    assert re.fullmatch(
        r".*card\.html: not written \(.*Is a directory.*\); the data is whole, .* tries again", told.message
    )


def test_examples_are_samples_of_all_splits_and_the_same_each_time(out: Path, tmp_path: Path) -> None:
    examples = examples_of(out, ["train", "validation"])
    assert examples == examples_of(out, ["train", "validation"])
    assert len({own.key for own in examples}) == MOST_EXAMPLES
    assert {own.split for own in examples} == {"train", "validation"}
    assert all(own.picture is not None for own in examples)
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    tar = next((damaged / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    for at in range(1_000, len(content), 200):
        content[at] ^= 0xFF
    tar.write_bytes(content)
    assert any(own.picture is None for own in examples_of(damaged, ["train", "validation"]))


def test_large_pictures_make_a_small_card(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(MOST_EXAMPLES):
        Image.effect_noise((600, 500), 90).convert("RGB").save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"noise {i}")
    prepare(folder, tmp_path / "out")
    assert (tmp_path / "out/card.html").stat().st_size < MOST_BYTES


def test_the_page_says_which_equal_pictures_are_still_there(out: Path) -> None:
    fields = Summary.read(out / "prepared.json").__dict__ | {"cleaning": {"repeats": 914, "in_test": 557}}
    page = data_card(Summary(**fields), {}, [], written="now")
    assert "914 samples repeat the picture of an earlier one; --dedupe pixels leaves them out." in page
    own = "557 samples to train on have a picture of the source&#x27;s own test split; --exclude test leaves them out."
    assert own in page or own.replace("&#x27;", "'") in page


@pytest.mark.parametrize("count", [8, 1_500, 14_558, 12_423_374])
def test_counts_beside_an_axis_leave_its_name_room(count: int) -> None:
    chart = log_chart("Size", {"": [(64, 65, count)]}, x_label="pixels")
    box = chart.axes.yaxis.label.get_window_extent()
    assert box.x0 >= 0
    ticks = [text.get_text() for text in chart.axes.get_yticklabels()]
    assert len(ticks) > 2
    assert all(re.fullmatch(r"[\d.]+[kM]?|", tick) for tick in ticks)


def test_histograms_of_splits_are_added_and_tails_are_cut() -> None:
    def card(counts: dict[str, int]) -> dict[str, object]:
        histogram = {"bins_an_octave": 64, "scale": 1, "counts": counts}
        return {"statistics": {"histograms": {"words": histogram}}}

    bins = bins_of_all([card({"1": 3, "2": 900}), card({"2": 90, "1024": 5}), {}], "words")
    assert bins == [(1, 2, 3), (2, 3, 990), (1024, 1040, 5)]
    assert cut_off(bins) == (bins[:2], bins[2:])
    assert "Sizes" in log_chart("Sizes", {"": [(1, 2, 3)]}, x_label="pixels").svg
