"""Class folders: preparing data and evaluating find the same classes in the layouts that people have."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sources_for_tests import picture, prepare, rejects, samples, write_files
from test_benchmarks import opened

from mlip_cli.data.sources.class_names import class_names
from mlip_cli.data.sources.listing import PassedOver, number_order
from mlip_cli.data.sources.records import split_of_name
from mlip_cli.data.sources.wordnet import english_name, imagenet_classes, imagenet_names
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.find import find_benchmark

Files = Mapping[str, bytes | str]


def tree(*folders: str, n: int = 2, more: Files | None = None) -> dict[str, bytes | str]:
    """`n` pictures in each of the folders, and more files."""
    found: dict[str, bytes | str] = dict(more or {})
    for folder in folders:
        found |= {f"{folder}/{i}.png": picture(len(found) + i) for i in range(n)}
    return found


def under(*tops: str, classes: tuple[str, ...] = ("cat", "dog")) -> list[str]:
    return [f"{top}/{name}" for top in tops for name in classes]


CLASSES: dict[str, tuple[Files, list[str]]] = {
    "plain": (tree("cat", "golden_retriever"), ["cat", "golden retriever"]),
    "deeper folders are no classes": (tree("cat/small", "dog/big/old"), ["cat", "dog"]),
    "wrapper": (tree(*under("images")), ["cat", "dog"]),
    "wrapper in a wrapper": (tree(*under("office/amazon/images")), ["cat", "dog"]),
    "one split": (tree(*under("dataset/val2017")), ["cat", "dog"]),
    "birds": (
        tree(
            "images/001.Black_footed_Albatross",
            "images/002.Laysan_Albatross",
            more={"classes.txt": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n", "images.txt": "1 x\n"},
        ),
        ["Black footed Albatross", "Laysan Albatross"],
    ),
    "dogs": (
        tree("Images/n02085620-Chihuahua", "Images/n02085782-Japanese_spaniel"),
        ["Chihuahua", "Japanese spaniel"],
    ),
    "thumbnails beside": (tree(*under("Images"), n=3, more=tree("thumbs", n=1)), ["cat", "dog"]),
    "WordNet ids": (tree("n02979186", "n01440764"), ["tench", "cassette player"]),
    "WordNet ids of ImageNet-21k": (tree("n00005787", "n00006024"), ["benthos", "heterotroph"]),
    "a pictures folder in each class": (tree("n01440764/images", "n02979186/images"), ["tench", "cassette player"]),
    "a class called train": (tree("bus", "train", "bullet_train"), ["bullet train", "bus", "train"]),
    "numbers": (tree("10", "2", "1"), ["1", "2", "10"]),
    "names by numbers": (tree("10", "2", "1", more={"classnames.txt": "a\nb\n\nc d\n"}), ["a", "b", "c d"]),
    "names in a wrapper": (tree("x/1", "x/2", more={"x/classnames.txt": "a\nb\n"}), ["a", "b"]),
    "names above a wrapper": (tree("x/1", "x/2", more={"classnames.txt": "a\nb\n"}), ["a", "b"]),
    "names for a folder called data": (tree("1", "data", more={"classnames.txt": "a\nb\n"}), ["a", "b"]),
    "leftovers": (
        tree(
            "cat",
            "dog",
            more={
                ".DS_Store": "",
                "cat/._0.png": "",
                "cat/.ipynb_checkpoints/0.png": picture(90),
                "__MACOSX/cat/0.png": "",
                "dog/Thumbs.db": "",
            },
        ),
        ["cat", "dog"],
    ),
    "signs": (tree("a\nb", "\U0001f431 \u732b", "x" * 250), ["a b", "x" * 250, "\U0001f431 \u732b"]),
    "normal form D": (tree(unicodedata.normalize("NFD", "caf\u00e9"), "dog"), ["caf\u00e9", "dog"]),
}
"""Layout -> its files, and the classes in their order."""


def in_prepared(folder: Path, out: Path) -> dict[str, int]:
    """Class -> its pictures, of the only split."""
    prepare(folder, out)
    [split] = [own for own in ("train", "validation", "test") if (out / own).is_dir()]
    assert all(sample["captions"][0]["text"] == sample["class"] for sample in samples(out, split))
    labels = [sample["class"] for sample in samples(out, split)]
    return {label: labels.count(label) for label in labels}


def in_evaluation(folder: Path) -> tuple[list[str], dict[str, int]]:
    pictures = opened(f"folder:{folder}", folder)
    labels = [pictures.class_names[label] for _, label in pictures.items]
    return list(pictures.class_names), {label: labels.count(label) for label in labels}


@pytest.mark.parametrize("layout", CLASSES)
def test_preparing_and_evaluating_find_the_same_classes(layout: str, tmp_path: Path) -> None:
    files, wanted = CLASSES[layout]
    folder = write_files(tmp_path / "in", files)
    names, counts = in_evaluation(folder)
    assert names == wanted
    assert in_prepared(folder, tmp_path / "out") == counts
    assert set(counts) == set(wanted)


BOTH_SPLITS = tree(*under("train", "val"))
MAKE = "make one folder for each class in {0}/"
CONVERT = "convert them to JPEG or PNG, in class folders"
REFUSED: dict[str, tuple[Files, str]] = {
    "no class": (
        tree("Images", more={"notes.txt": "taken in spring\n"}),
        f"{{1}}: 2 pictures in the folder Images, not in folders of several classes; {MAKE}, or name the file that "
        "says what they show (notes.txt)",
    ),
    "one class": (
        tree("val/dog"),
        f"{{1}}: 2 pictures in the folder dog, not in folders of several classes; {MAKE}",
    ),
    "pictures and masks": (
        tree("images", "masks_2"),
        f"{{1}}: 4 pictures in the folders images, masks_2, not in folders of several classes; {MAKE}",
    ),
    "pieces": (
        tree("images_001/images", "images_002/images"),
        f"{{1}}: 4 pictures in the folders images_001, images_002, not in folders of several classes; {MAKE}",
    ),
    "flat splits": (tree("train2017", "val2017"), f"{{1}}: pictures outside of class folders; {MAKE}"),
    "a text beside each picture": (
        tree("dog", more={"dog/0.json": "{}"}),
        f"{{1}}: 2 pictures in the folder dog, not in folders of several classes; {MAKE}",
    ),
    "domains": (
        tree(*under("amazon/images", "dslr/images", "webcam/images")),
        "{1}: amazon, dslr, webcam hold the same folders (cat, dog), so they are parts of a data set and not classes; "
        "name one, such as {1}/amazon; if they are classes, name them in classnames.txt",
    ),
    "letters": (
        tree("SUN/a/abbey", "SUN/a/alley", "SUN/b/barn/indoor"),
        "{1}: a, b are letters above the classes (a/abbey) and not classes; move the classes up to one folder",
    ),
    "not UTF-8": (tree(os.fsdecode(b"caf\xe9"), "dog"), "{1}: caf\\udce9: a name that is not UTF-8; rename it"),
    "a space": (tree(" ", "dog"), "{1}: a class folder called ' '; give it a name that can be read"),
    "too few names": (
        tree("1", "2", more={"classnames.txt": "a\n"}),
        "{0}/classnames.txt: 1 names for 2 class folders; write one name a line, in the order of the folders",
    ),
    "mostly HEIC": (
        tree("cat", "dog", n=1, more={f"cat/{i}.heic": "" for i in range(3)}),
        f"{{1}}: 3 of 5 pictures cannot be used: 3 .heic files (first: cat/0.heic); {CONVERT}",
    ),
    "mostly in no class": (
        tree("cat", "dog", n=1, more={f"{i}.png": picture(i) for i in range(3)}),
        f"{{1}}: 3 of 5 pictures cannot be used: 3 pictures in no class folder (first: 0.png); {CONVERT}",
    ),
}
"""Layout -> its files, and the error with {0} for the folder and {1} for what the user wrote."""


@pytest.mark.parametrize("layout", REFUSED)
def test_preparing_and_evaluating_refuse_the_same_layouts(layout: str, tmp_path: Path) -> None:
    files, message = REFUSED[layout]
    folder = write_files(tmp_path / "in", files)
    for source, refused in (
        (str(folder), lambda: prepare(folder, tmp_path / "out")),
        (f"folder:{folder}", lambda: find_benchmark(f"folder:{folder}")),
    ):
        with pytest.raises((UsageError, RunError)) as error:
            refused()
        assert str(error.value) == message.format(folder, source)
        assert isinstance(error.value, RunError) == layout.startswith("mostly")
    assert not (tmp_path / "out").exists()


SPLITS = {
    "train": "train", "train2017": "train", "Training": "train", "training_set": "train", "seg_train": "train",
    "TrainImages": "train", "val_256": "validation", "valid": "validation", "ILSVRC2012_img_val": "validation",
    "test-images": "test", "testing": "test", "evaluation": "test", "bullet_train": None, "test_tube": None,
    "trains": None, "images": None,
}  # fmt: skip


def test_names_of_splits() -> None:
    assert {name: split_of_name(name) for name in SPLITS} == SPLITS


@pytest.mark.parametrize(
    ("train", "held_out", "split"),
    [
        ("train2017", "val2017", "validation"),
        ("Training", "testing", "test"),
        ("cars_train", "cars_test", "test"),
        ("trainA", "testA", "test"),
    ],
)
def test_splits_are_splits_in_preparing_and_refused_in_evaluating(
    tmp_path: Path, train: str, held_out: str, split: str
) -> None:
    folder = write_files(tmp_path / "in", tree(*under(f"data/{train}/x", f"data/{held_out}/x")))
    prepare(folder, tmp_path / "out")
    for own in ("train", split):
        assert [sample["class"] for sample in samples(tmp_path / "out", own)] == ["cat", "cat", "dog", "dog"]
    with pytest.raises(UsageError) as error:
        find_benchmark(f"folder:{folder}")
    assert str(error.value) == (
        f"folder:{folder}: data/{held_out} and data/{train} are splits of a data set and not classes; name one of "
        f"them, such as folder:{folder}/data/{held_out}"
    )
    assert in_evaluation(folder / "data" / held_out)[1] == {"cat": 2, "dog": 2}


def test_a_split_without_classes_is_not_proposed(tmp_path: Path) -> None:
    """As competitions hand out: the test pictures have no classes."""
    folder = write_files(tmp_path / "in", tree(*under("train"), n=3) | tree("test"))
    with pytest.raises(UsageError) as error:
        find_benchmark(f"folder:{folder}")
    assert str(error.value) == (
        f"folder:{folder}: train is a split of a data set and not a class; name folder:{folder}/train"
    )
    assert prepare(folder, tmp_path / "out")["reasons"] == {"not in a class folder": 2}


def test_pictures_beside_the_classes_are_rejects_and_passed_over(tmp_path: Path) -> None:
    more = {"val/images/9.png": picture(9), "train/8.png": picture(8), "train/cat/a.heic": "", "train/cat/\x1b.txt": ""}
    folder = write_files(tmp_path / "in", tree(*under("train")) | more)
    assert prepare(folder, tmp_path / "out")["reasons"] == {"not in a class folder": 2}
    assert [row[0] for row in rejects(tmp_path / "out")] == ["train/8.png", "val/images/9.png"]
    passed_over = opened(f"folder:{folder}/train", tmp_path).passed_over
    kinds = {"pictures in no class folder": "8.png", ".heic files": "cat/a.heic", ".txt files": "cat/\\x1b.txt"}
    assert passed_over == PassedOver(dict.fromkeys(kinds, 1), kinds)


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        (
            tree("golden_retriever", "golden retriever", "Cat", "cat"),
            [
                "'Cat' and 'cat' read alike, as 'Cat'; make them one class, or rename one",
                "'golden retriever' and 'golden_retriever' read alike, as 'golden retriever'; make them one class, or "
                "rename one",
            ],
        ),
        (
            tree("caf\u00e9", "cafe\u0301"),
            ["'cafe\\u0301' and 'caf\\xe9' read alike, as 'caf\u00e9'; make them one class, or rename one"],
        ),
        (
            tree("10", "2", "n99999999", "class_7", "oak"),
            [
                "4 of 5 class names say nothing about the pictures (10, 2, class 7 ...); write classnames.txt, one "
                "name a line in the order of the folders"
            ],
        ),
        (tree("10", "2", more={"classnames.txt": "oak\nash\n"}), []),
        (
            tree("Aves/owl", "Aves/2", "Plantae/oak", "Plantae/elm"),
            [
                "each class holds folders of pictures (Aves: 2, owl); if those are the classes, move them up to one "
                "folder"
            ],
        ),
    ],
)
def test_doubtful_names_are_warned_of(
    tmp_path: Path, files: Files, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "in", files)
    for source, read in (
        (f"folder:{folder}", lambda: opened(f"folder:{folder}", folder)),
        (str(folder), lambda: prepare(folder, tmp_path / "out")),
    ):
        caplog.clear()
        read()
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert [line for line in warnings if line.startswith(f"{source}: ")] == [f"{source}: {line}" for line in lines]


def test_what_was_understood_is_said_before_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mlip_cli")
    more = {"images/classnames.txt": "oak\nash\nelm\nfir\n", "images/4/a.avif": ""}
    folder = write_files(tmp_path / "in", tree("images/1", "images/2", "images/10", more=more))
    pictures = opened(f"folder:{folder}", folder)
    prepare(folder, tmp_path / "out")
    named = "images/classnames.txt: 1 = oak, 2 = ash, 4 = elm ..."
    assert caplog.messages[:5] == [
        f"folder:{folder}: the class folders lie in images/",
        f"folder:{folder}: {named}",
        f"folder:{folder}: 1 class without pictures (4); the names are still candidates",
        f"{folder}: {named}",
        f"{folder}: 6 pictures in 4 classes in images/: oak, ash, elm ...; 6 rows",
    ]
    assert pictures.in_words() == (
        "6 pictures in 4 classes: oak, ash, elm ...; prompts like 'a photo of a oak.'; passed over: 1 .avif file "
        "(first: images/4/a.avif)"
    )


def test_hidden_files_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", tree("cat", "dog"))
    before = find_benchmark(f"folder:{folder}").fingerprint
    write_files(folder, {".DS_Store": "x", "cat/._0.png": "x", "__MACOSX/cat/0.png": "x", "Thumbs.db": "x"})
    assert find_benchmark(f"folder:{folder}").fingerprint == before
    write_files(folder, {"classnames.txt": "a\nb\n"})
    assert find_benchmark(f"folder:{folder}").fingerprint != before


def test_a_data_set_whose_name_is_not_utf8_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        find_benchmark("folder:" + os.fsdecode(b"caf\xe9"))
    assert str(error.value) == "folder:caf\\udce9: a name that is not UTF-8; rename it"


def test_names_in_a_locale_without_utf8_get_the_cure(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", tree("caf\u00e9", "dog"))
    code = "import sys; from mlip_cli.evaluate.datasets import find; find.find_benchmark('folder:' + sys.argv[1])"
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[1],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        f"mlip_cli.errors.UsageError: folder:{folder}: caf\\udcc3\\udca9: Python reads names as ascii here; set "
        "PYTHONUTF8=1"
    )


def test_the_names_of_wordnet_ids_are_those_of_clip_benchmark() -> None:
    from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

    assert list(imagenet_classes()) == all_imagenet_wordnet_ids
    assert [english_name(wnid) for wnid in all_imagenet_wordnet_ids] == list(imagenet_names())
    assert english_name("n99999999") is None


def test_prepared_imagenet_keeps_its_classes(tmp_path: Path) -> None:
    write_files(tmp_path / "in", tree("val/n01440764", "val/n02979186"))
    prepare(tmp_path / "in", tmp_path / "imagenet")
    (tmp_path / "imagenet" / "validation").rename(tmp_path / "imagenet" / "val")
    pictures = opened("imagenet", tmp_path)
    assert [label for _, label in pictures.items] == [0, 0, 482, 482]


def test_ids_before_names_go_only_where_all_folders_have_one() -> None:
    assert list(class_names(["1_cat", "02-dog_house"]).values()) == ["cat", "dog house"]
    assert list(class_names(["3_d_printer", "cat"]).values()) == ["3 d printer", "cat"]
    assert number_order(["10.a", "2.b", "1"]) == ["1", "2.b", "10.a"]
    assert number_order(["c10", "c2", "c1"]) == ["c1", "c2", "c10"]
    assert number_order(["10", "2", "3d"]) == ["10", "2", "3d"]
    assert number_order(["10", "2", "c1"]) == ["10", "2", "c1"]
    assert number_order(["b", "a"]) == ["a", "b"]


def test_passed_over_is_in_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fields are written, read and shown."""
    from results_for_tests import zeroshot_result

    from mlip_cli.evaluate.results import ZeroshotResult
    from mlip_cli.report.scores import ZeroshotRow, zeroshot_tables
    from mlip_cli.report.tables import print_tables

    result: Any = zeroshot_result(passed_over={"counts": {".heic files": 2}, "first": {".heic files": "cat/a.heic"}})
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["passed_over"] == {"counts": {".heic files": 2}, "first": {".heic files": "cat/a.heic"}}
    assert ZeroshotResult.from_json(stored) == result
    del stored["passed_over"]  # as results before had it
    assert ZeroshotResult.from_json(stored).passed_over == PassedOver()
    [table, *_] = zeroshot_tables("a\nb\x1b", [ZeroshotRow(result)])
    print_tables([table])
    assert capsys.readouterr().out.splitlines()[0] == "a\\nb\\x1b"
    assert table.notes[1] == "passed over: 2 .heic files (first: cat/a.heic)"
    [table, *_] = zeroshot_tables("x", [ZeroshotRow(zeroshot_result(mean_per_class_recall_interval=(0.0, 0.01)))])
    assert table.notes[1:] == ["below chance: are the class names right?"]


@pytest.mark.parametrize(("classes", "is_proposed"), [(("red", "blue"), True), (tuple(map(str, range(40))), False)])
def test_the_proposed_training_knows_that_classes_share_captions(
    tmp_path: Path, classes: tuple[str, ...], is_proposed: bool
) -> None:
    """With half of a batch of one class, a loss over pairs looks stuck at guessing."""
    n = 40 // len(classes)
    summary = prepare(write_files(tmp_path / "in", tree(*classes, n=n)), tmp_path / "out")
    commands = list(summary["next"].values())
    assert len(commands) == 2
    assert ["losses.positives=concept" in command for command in commands] == [is_proposed] * 2


def test_names_and_templates_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    more = {"classnames.txt": "\ufeffoak\r\nash\r\n", "templates.txt": "\ufeffone {c}.\r\n"}
    pictures = opened(f"folder:{write_files(tmp_path, tree('1', '2', more=more))}", tmp_path)
    assert (pictures.class_names, pictures.templates) == (("oak", "ash"), ("one {c}.",))
