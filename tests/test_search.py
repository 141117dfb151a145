"""`mlip search`: exact, incremental, safe against damage and interruption; and its table and page."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browser_for_tests import Browser
from foreign_for_tests import CONFIGURATIONS, write_open_clip
from models_for_tests import make_run, small_recipe
from PIL import Image
from shards_for_tests import make_dataset
from sources_for_tests import picture, write_files, write_sidecars, write_tar

import mlip_cli
from mlip_cli.commands.search import search as command
from mlip_cli.data.open import open_prepared
from mlip_cli.errors import Stopped, UsageError
from mlip_cli.evaluate import search as module
from mlip_cli.evaluate import vector_files
from mlip_cli.evaluate.search_pictures import open_pictures
from mlip_cli.files import write_json
from mlip_cli.runs.folder import Run
from mlip_cli.runs.recording import data_cards

EVIL = "<script>alert(1)</script> \"quoted\" 'single' & \x1b[31m 😀"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its training data and other shards with some of the same pictures, and a folder of pictures."""
    folder = tmp_path_factory.mktemp("search")
    train = make_dataset(folder / "data/train", n=24, seed=1)
    make_dataset(folder / "data/validation", n=16, seed=2, prefix="validation")
    make_run(folder / "run", small_recipe(train=str(train)))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(*texts: str, images: str, pictures: tuple[str, ...] = (), top: int = 5, **more: Any) -> None:
    options: dict[str, Any] = {"merge_rate": None, "out": None, "batch_size": 8, "device": "cpu", "as_json": True}
    command("run", texts, image_queries=[Path(own) for own in pictures], images=images, top=top, **options | more)


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def names(result: dict[str, Any], query: int = 0) -> list[str]:
    return [own["picture"] for own in result["queries"][query]["found"]]


def cosines(result: dict[str, Any]) -> dict[str, float]:
    """Of the first query, by picture."""
    return {own["picture"]: own["cosine"] for own in result["queries"][0]["found"]}


def by_hand(files: list[Path], text: str) -> list[tuple[str, float]]:
    """Every picture with its cosine, the nearest first, by the model alone."""
    model = mlip_cli.load("run", device="cpu")
    images = model.encode_image([Image.open(file) for file in files])
    cosines = (images.double() @ model.encode_text([text]).double().T)[:, 0].tolist()
    ordered = sorted(zip(files, cosines, strict=True), key=lambda own: -own[1])
    return [(str(file), cosine) for file, cosine in ordered]


# what is found -------------------------------------------------------------------------------------------------------


def test_the_nearest_pictures_are_those_by_hand(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sidecars(place / "mine", 40)
    search("a red square", "picture number 3", images="mine", pictures=("mine/00007.png",))
    result = found(capsys)
    assert (result["num_pictures"], result["num_encoded"], result["passed_over"]) == (40, 40, None)
    expected = by_hand(sorted(Path("mine").glob("*.png")), "a red square")[:5]
    assert [f"mine/{name}" for name in names(result)] == [name for name, _ in expected]
    assert list(cosines(result).values()) == pytest.approx([cosine for _, cosine in expected], abs=1e-6)
    assert [own["rank"] for own in result["queries"][0]["found"]] == [1, 2, 3, 4, 5]
    of_picture = result["queries"][2]
    assert (of_picture["text"], of_picture["picture"]) == (None, "mine/00007.png")
    assert of_picture["found"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert result["queries"][0]["found"][0]["caption"].startswith("picture number")


def test_a_folder_a_table_tars_and_shards_hold_the_same_pictures(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {f"{i}.png": picture(i) for i in range(9)}
    write_files(place / "folder", contents)
    rows = "".join(f"folder/{i}.png,caption {i}\nfolder/{i}.png,other {i}\n" for i in range(9))
    write_files(place, {"table.csv": f"path,title\n{rows}"})
    members: dict[str, bytes | str] = {}
    for i in range(9):
        members |= {f"{i}.png": contents[f"{i}.png"], f"{i}.txt": f"caption {i}"}
    write_tar(place / "tars/0.tar", members)
    cosines = {}
    for images in ("folder", "table.csv", "tars"):
        search("a red square", images=images, top=20)
        result = found(capsys)
        assert result["num_pictures"] == 9
        cosines[images] = [own["cosine"] for own in result["queries"][0]["found"]]
        captions = {own["caption"] for own in result["queries"][0]["found"]}
        assert captions == ({None} if images == "folder" else {f"caption {i}" for i in range(9)})
    assert cosines["folder"] == pytest.approx(cosines["table.csv"], abs=1e-6)
    assert cosines["folder"] == pytest.approx(cosines["tars"], abs=1e-6)
    search("a red square", images="data/train", top=30)
    assert found(capsys)["num_pictures"] == 24
    search("a red square", images="data", top=50)
    assert {name.split("/")[0] for name in names(found(capsys))} == {"train", "validation"}


def test_all_pictures_of_a_folder_are_searched_with_the_captions_of_its_table(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(place / "mine", {f"in/{i}.png": picture(i) for i in range(6)})
    rows = "".join(f"in/{i}.png,caption {i}\n" for i in (0, 1, 9))
    write_files(place / "mine", {"metadata.csv": f"file_name,caption\n{rows}", "in/4.txt": "beside it"})
    search("a red square", images="mine", top=9)
    result = found(capsys)
    captions = {own["picture"]: own["caption"] for own in result["queries"][0]["found"]}
    assert captions == {f"in/{i}.png": {0: "caption 0", 1: "caption 1", 4: "beside it"}.get(i) for i in range(6)}
    assert result["passed_over"].startswith("1 picture missing (first: metadata.csv: row 2: in/9.png: no such file")


def test_broken_pictures_are_counted_and_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(
        place / "mine", {**{f"{i}.png": picture(i) for i in range(4)}, "no.jpg": b"text", "cut.png": picture(9)[:60]}
    )
    search("a red square", images="mine")
    result = found(capsys)
    assert result["num_pictures"] == 4
    assert "1 damaged picture (first: cut.png: " in result["passed_over"]
    assert "1 not a picture (first: no.jpg: not JPEG, PNG" in result["passed_over"]
    write_files(place / "bad", {"a.png": b"text"})
    with pytest.raises(UsageError, match="--images bad: none of its pictures can be used: 1 not a picture"):
        search("a red square", images="bad")


# vectors are kept ----------------------------------------------------------------------------------------------------


def test_pictures_that_are_added_changed_and_removed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sidecars(place / "mine", 12)
    search("a red square", images="mine", top=50)
    before = found(capsys)
    search("a red square", images="mine", top=50)
    again = found(capsys)
    assert (again["num_encoded"], again["queries"]) == (0, before["queries"])
    write_files(place / "mine", {"new.png": picture(50), "00003.png": picture(51)})
    (place / "mine/00005.png").unlink()
    search("a red square", images="mine", top=50)
    after = found(capsys)
    assert (after["num_encoded"], after["num_pictures"]) == (2, 12)
    assert "new.png" in names(after)
    assert "00005.png" not in names(after)
    shutil.rmtree(place / "run/search")
    search("a red square", images="mine", top=50)
    anew = found(capsys)
    assert anew["num_encoded"] == 12
    assert cosines(anew) == pytest.approx(cosines(after), abs=1e-6)  # batches of another size round otherwise


def test_other_weights_rates_and_collections_have_vectors_of_their_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sidecars(place / "mine", 5)
    shutil.copytree(place / "mine", place / "other")
    for more in ({"images": "mine"}, {"images": "other"}, {"images": "mine", "merge_rate": 0.0}):
        search("a red square", **more)
        assert found(capsys)["num_encoded"] == 5
    shutil.rmtree(place / "run/checkpoints")
    make_run(place / "anew", small_recipe(), seed=1)
    shutil.move(place / "anew/checkpoints", place / "run/checkpoints")
    search("a red square", images="mine")
    assert found(capsys)["num_encoded"] == 5
    assert len(list((place / "run/search").iterdir())) == 4


@pytest.mark.parametrize("at", [0, 9, 20, 70, -3])
def test_a_damaged_file_is_made_again_with_a_warning(
    at: int, place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_sidecars(place / "mine", 10)
    search("a red square", images="mine")
    expected = found(capsys)
    [file] = place.glob("run/search/*/*.vectors")
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)
    with caplog.at_level("WARNING", logger="mlip_cli"):
        search("a red square", images="mine")
    result = found(capsys)
    assert (result["num_encoded"], result["queries"]) == (10, expected["queries"])
    assert any(
        "damaged (" in line and "deleted, and its pictures are encoded again" in line for line in caplog.messages
    )


def test_a_second_attempt_counts_broken_pictures_once(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_files, "CHECKED_BYTES", 0)  # so that damage is first found while searching
    write_files(place / "mine", {**{f"{i}.png": picture(i) for i in range(4)}, "cut.png": picture(9)[:60]})
    search("a red square", images="mine")
    expected = found(capsys)
    [file] = place.glob("run/search/*/*.vectors")
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\x7f")  # not a number
    search("a red square", images="mine")
    result = found(capsys)
    assert (result["num_encoded"], result["passed_over"]) == (4, expected["passed_over"])
    assert result["passed_over"].startswith("1 damaged picture")


def test_weights_of_another_program_are_looked_up_once(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_sidecars(place / "mine", 3)
    write_open_clip(place / "theirs", CONFIGURATIONS["laion"])
    options: dict[str, Any] = {"image_queries": [], "top": 2, "merge_rate": None, "out": None, "batch_size": 8}
    with caplog.at_level("INFO", logger="mlip_cli"):
        command("theirs", ["a red square"], images="mine", device="cpu", as_json=True, **options)
    assert [line for line in caplog.messages if line.startswith("theirs: run ")] == []
    assert found(capsys)["num_pictures"] == 3


def test_vectors_stay_when_a_search_is_interrupted(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sidecars(place / "mine", 40)
    monkeypatch.setattr(module, "FILE_ROWS", 8)
    real, calls = module.ImageTextEncoder.encode_pixels, iter(range(100))

    def until_ctrl_c(self: Any, pixels: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(module.ImageTextEncoder, "encode_pixels", until_ctrl_c)
    with pytest.raises(Stopped, match="interrupted; the same command goes on"):
        search("a red square", images="mine")
    assert not list(place.glob("run/search/*/.*"))
    monkeypatch.setattr(module.ImageTextEncoder, "encode_pixels", real)
    search("a red square", images="mine")
    assert found(capsys)["num_encoded"] == 16


@pytest.mark.slow
def test_two_searches_at_once(place: Path) -> None:
    write_sidecars(place / "mine", 60)
    line = [sys.executable, "-m", "mlip_cli", "search", "run", "a red square", "--images", "mine", "--json"]
    line += ["--device", "cpu", "--batch-size", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(mlip_cli.__file__).parents[1])}
    both = [
        subprocess.Popen([*line, "--out", f"{i}.html"], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(2)
    ]
    first, second = (json.loads(own.communicate()[0])["queries"] for own in both)
    assert first == second
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    result = json.loads(done.stdout)
    assert (result["num_encoded"], result["queries"]) == (0, first)
    assert not list(place.glob("run/search/*/.*"))


def test_a_run_that_cannot_be_written_is_searched_all_the_same(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_sidecars(place / "mine", 6)
    write_files(place / "run", {"search": "a file in the way"})
    with caplog.at_level("WARNING", logger="mlip_cli"):
        search("a red square", images="mine", out=Path("page.html"))
    assert found(capsys)["num_pictures"] == 6
    assert any("6 vectors not kept, so the next search makes them again" in line for line in caplog.messages)


# what training saw ---------------------------------------------------------------------------------------------------


def with_cards(place: Path) -> None:
    """The card of the training data, as pretrain writes it."""
    write_json(place / "run/data.json", data_cards([open_prepared(place / "data/train")], []))


def marks(result: dict[str, Any]) -> dict[str, bool | None]:
    return {own["picture"]: own["was_trained_on"] for own in result["queries"][0]["found"]}


@pytest.mark.slow
def test_pictures_of_training_are_told_apart(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run/recipe.yaml").write_text(
        (place / "run/recipe.yaml").read_text().replace(small_path(place), str(place / "data/train"))
    )
    search("a red square", images="data", top=99)
    result = found(capsys)
    assert set(marks(result).values()) == {None}
    assert result["trained_on"] == "not known which of them training saw: the run has no cards of its data"
    with_cards(place)
    search("a red square", images="data", top=99)
    result = found(capsys)
    assert all(own == name.startswith("train/") for name, own in marks(result).items())
    assert len(marks(result)) == 40
    assert result["trained_on"] == "seen in training: the bytes of the picture are among the 24 training pictures"
    search("a red square", images="data/train", top=99)
    assert set(marks(found(capsys)).values()) == {True}
    stored = open_prepared(place / "data/train").read(5)
    write_files(place / "mine", {"copy.webp": stored.image, "other.png": picture(3)})
    search("a red square", images="mine")
    assert marks(found(capsys)) == {"copy.webp": True, "other.png": False}
    shutil.rmtree(place / "data/train")
    search("a red square", images="mine")
    result = found(capsys)
    assert set(marks(result).values()) == {None}
    assert result["trained_on"].startswith("not known which other pictures training saw: ")


def small_path(place: Path) -> str:
    [path] = [own["path"] for own in Run(place / "run").read_recipe().model_dump()["data"]["train"]]
    return str(path)


# table and page ------------------------------------------------------------------------------------------------------


def test_the_table_and_the_page_show_any_query_as_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(place / "mine", {"a.png": picture(1), "a.txt": EVIL, f"<b>{'x' * 40}.png": picture(2)})
    long = "a red square " * 170
    search(EVIL, long, images="mine", as_json=False)
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out
    assert "<script>alert(1)</script> \"quoted\" 'single' & \\x1b[31m 😀" in out
    assert "the query was cut to 16 tokens, which is all that this model reads" in out
    assert max(map(len, out.splitlines())) < 400
    page = (place / "run/search.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &quot;quoted&quot;") >= 3
    assert "The query was cut to 16 tokens" in page
    assert "<b>" not in page


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_draws_the_page_and_fetches_nothing(place: Path, chromium: Browser, width: int, scheme: str) -> None:
    write_files(place, {"asked.png": picture(3)})
    search(EVIL, "word" * 90, "a red square " * 170, images="data", pictures=("asked.png",))
    chromium.open(place / "run/search.html", width=width, scheme=scheme)
    assert [address for address in chromium.requested() if not address.startswith(("data:", "file:"))] == []
    assert chromium.complaints() == []
    assert chromium.evaluate("document.scripts.length") == 0
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert chromium.evaluate("document.images.length") == 4 * 5 + 1
    assert chromium.evaluate("Array.from(document.images).every(own => own.naturalWidth > 0 && own.width < 300)")


# mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "more", "message"),
    [
        ((), {}, "nothing to search for; name a text, as in mlip search RUN 'a red heart', or --image FILE"),
        ((" ",), {}, "an empty text; write what to search for, as in 'a red heart'"),
        (("a",), {"images": "nowhere"}, "--images nowhere: no such file or folder; name pictures to search among"),
        (("a",), {"images": "empty"}, "empty: the folder is empty; looked for"),
        (("a",), {"pictures": ("no.png",)}, "--image no.png: No such file or directory; name a picture file"),
        (("a",), {"pictures": ("text.png",)}, "--image text.png: not a picture: not JPEG"),
        (("a",), {"out": Path("data")}, "--out data: is a folder; name a file"),
        (("a",), {"out": Path("x/y.html")}, "--out x/y.html: folder x does not exist; make it"),
        (("a",), {"merge_rate": 0.999}, ""),
    ],
)
def test_mistakes_are_one_line(texts: tuple[str, ...], more: dict[str, Any], message: str, place: Path) -> None:
    write_files(place, {"text.png": b"text", "empty/.hidden": ""})
    with pytest.raises(UsageError) as error:
        search(*texts, **{"images": "data", **more})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_pictures_in_compressed_tars_are_refused(place: Path) -> None:
    import gzip

    write_tar(place / "0.tar", {"0.png": picture(0), "0.txt": "a caption"})
    (place / "tars").mkdir()
    (place / "tars/0.tar.gz").write_bytes(gzip.compress((place / "0.tar").read_bytes()))
    with pytest.raises(UsageError, match="--images tars: compressed tars; decompress them"):
        open_pictures("tars")


def test_pictures_inside_a_table_are_searched(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "image": [{"bytes": picture(i % 5), "path": f"{i}.png"} for i in range(6)],
        "caption": [f"c{i}" for i in range(6)],
    }
    pq.write_table(pa.table(rows), place / "t.parquet")
    search("a red square", images="t.parquet", top=9)
    assert sorted(names(found(capsys))) == [f"{i}.png" for i in range(5)], "equal bytes are one picture"
