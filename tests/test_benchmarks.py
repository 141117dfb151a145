"""Evaluation data sets: found by name, opened from every layout, refused with one clear line."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from shards_for_tests import make_dataset

from mlip_cli.data.sources.wordnet import imagenet_classes
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.find import CLIP_BENCHMARK, SETS, data_root, find_benchmark
from mlip_cli.evaluate.datasets.open import names_of, open_benchmark
from mlip_cli.evaluate.datasets.pictures import Pictures, batches
from mlip_cli.recipe.config import Data
from mlip_cli.terminal.values import DATASETS, FAMILIES

WNIDS = ("n01440764", "n01443537", "n15075141")  # classes 0, 1 and 999


def picture(color: str | tuple[int, ...] = "red", *, format: str = "JPEG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (20, 14), color).save(file, format)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def opened(name: str, root: Path) -> Pictures:
    return open_benchmark(find_benchmark(name, root=root))


def labels(pictures: Pictures, *, batch_size: int = 2) -> list[int]:
    read = list(
        batches(
            pictures,
            range(pictures.num_pictures),
            data=Data(train=(), image_size=8),
            batch_size=batch_size,
            read_ahead=False,
        )
    )
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8) for images, _ in read)
    assert sum(len(images) for images, _ in read) == pictures.num_pictures
    return torch.cat([labels for _, labels in read]).tolist()


def usage_error(name: str, root: Path) -> str:
    with pytest.raises(UsageError) as error:
        opened(name, root)
    return str(error.value)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# names ---------------------------------------------------------------------------------------------------------------


def test_unknown_name_gets_a_guess_or_the_list(tmp_path: Path) -> None:
    assert usage_error("cifer10", tmp_path) == "unknown data set 'cifer10'; did you mean cifar10?"
    message = usage_error("things", tmp_path)
    assert message.startswith(
        "unknown data set 'things'; use openmoji, openmoji_combinations, digits, imagenet, folder:PATH, shards:PATH, "
        "wds/NAME, or a name of "
    )
    assert "\n" not in message


def test_a_folder_without_its_prefix_is_told_the_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_classes").mkdir()
    folder = "unknown data set 'my_classes'; for the folder of this name write folder:my_classes"
    assert usage_error("my_classes", tmp_path) == folder


def test_the_command_line_refuses_the_names_of_the_table_as_runs() -> None:
    assert {*DATASETS, *FAMILIES} == SETS.keys() - set(CLIP_BENCHMARK)


def test_clip_benchmark_knows_all_names_that_we_offer() -> None:
    import inspect

    from clip_benchmark.datasets import builder

    source = inspect.getsource(builder.build_dataset)
    assert all(f'"{name}"' in source for name in CLIP_BENCHMARK)


def test_data_root_is_given_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLIP_DATA", raising=False)
    assert data_root(None) == Path("data")
    monkeypatch.setenv("MLIP_DATA", "elsewhere")
    assert data_root(None) == Path("elsewhere")
    assert data_root(Path("here")) == Path("here")


# digits, folders, shards, openmoji ----------------------------------------------------------------------------------


def test_digits_are_the_real_ones(tmp_path: Path) -> None:
    pictures = opened("digits", tmp_path)
    found = labels(pictures, batch_size=500)
    assert len(found) == pictures.num_pictures == 1797
    assert found[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    image, _ = pictures.load(0)
    assert image.shape == (3, 8, 8)
    assert image.max() > 230


def test_folder_of_class_folders(tmp_path: Path) -> None:
    write(tmp_path / "big_cat" / "a.jpg", picture())
    write(tmp_path / "big_cat" / "deeper" / "b.png", picture((0, 0, 255, 0), format="PNG", mode="RGBA"))
    write(tmp_path / "dog" / "c.tif", picture((0, 255, 0, 0), format="TIFF", mode="CMYK"))
    write(tmp_path / "dog" / "notes.txt", "not a picture")
    write(tmp_path / ".cache" / "d.jpg", picture())
    pictures = opened(f"folder:{tmp_path}", tmp_path)
    assert pictures.class_names == ("big cat", "dog")
    assert pictures.templates == ("a photo of a {c}.",)
    assert labels(pictures) == [0, 0, 1]
    transparent, _ = pictures.load(pictures.items[1])
    assert transparent.min() == 255, "what is transparent is white, as in prepared data"


def test_folder_with_names_and_templates(tmp_path: Path) -> None:
    for name in ("0", "1"):
        write(tmp_path / name / "a.jpg", picture())
    write(tmp_path / "classnames.txt", "sunglasses\nsunglasses\n")
    write(tmp_path / "templates.txt", "{c}\na {c}\n")
    pictures = opened(f"folder:{tmp_path}", tmp_path)
    assert pictures.class_names == ("sunglasses", "sunglasses")
    assert pictures.templates == ("{c}", "a {c}")
    before = find_benchmark(f"folder:{tmp_path}", root=tmp_path).fingerprint
    write(tmp_path / "templates.txt", "{c}\nmy {c}\n")
    assert find_benchmark(f"folder:{tmp_path}", root=tmp_path).fingerprint != before
    write(tmp_path / "templates.txt", "{c}\na class\n")
    assert usage_error(f"folder:{tmp_path}", tmp_path) == (
        f"{tmp_path}/templates.txt: 'a class' has no {{c}}; write one template a line, with {{c}} for the class name"
    )
    write(tmp_path / "classnames.txt", "one\n")
    assert usage_error(f"folder:{tmp_path}", tmp_path) == (
        f"{tmp_path}/classnames.txt: 1 names for 2 class folders; write one name a line, in the order of the folders"
    )


def test_bad_folders_get_one_line(tmp_path: Path) -> None:
    assert usage_error(f"folder:{tmp_path}/no", tmp_path) == (
        f"folder:{tmp_path}/no: no such folder; name one that holds a folder of pictures for each class"
    )
    assert usage_error("folder:", tmp_path) == "folder:: no path; write folder:PATH"
    cure = f"; make one folder for each class in {tmp_path}/"
    assert usage_error(f"folder:{tmp_path}", tmp_path) == f"folder:{tmp_path}: no pictures{cure}"
    write(tmp_path / "texts" / "a.txt", "text")
    assert usage_error(f"folder:{tmp_path}", tmp_path) == f"folder:{tmp_path}: no pictures{cure}"
    write(tmp_path / "a.jpg", picture())
    cure += ", or name the file that says what they show (texts/a.txt)"
    message = f"folder:{tmp_path}: pictures outside of class folders{cure}"
    assert usage_error(f"folder:{tmp_path}", tmp_path) == message


PPM = b"P6 2 2 255 " + bytes(12)
"""Pillow could read it; that it does not is how we know that PostScript, say, is never run."""


@pytest.mark.parametrize("content", [picture()[:300], PPM, b""])
def test_a_picture_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "dog" / "a.jpg", picture())
    broken = write(tmp_path / "cat" / "b.jpg", content)
    with pytest.raises(RunError, match=rf"^{broken}: (damaged|not a) picture: .*; repair this picture or remove it$"):
        labels(opened(f"folder:{tmp_path}", tmp_path))


def test_shards_take_the_class_from_the_record(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "test", n=10, shard_size=4)
    pictures = opened(f"shards:{folder}", tmp_path)
    assert len(pictures.class_names) == 8
    assert pictures.class_names == tuple(sorted(pictures.class_names))
    assert pictures.class_names[labels(pictures)[0]] == "red"
    found = usage_error(f"shards:{tmp_path}", tmp_path)
    assert found == f"shards:{tmp_path}: no dataset.json in {tmp_path}; name {tmp_path}/test"


def test_missing_openmoji_names_the_command(tmp_path: Path) -> None:
    assert usage_error("openmoji", tmp_path) == (
        f"openmoji: no prepared data in {tmp_path}/openmoji/test; run mlip prepare-data openmoji {tmp_path}/openmoji"
    )
    assert usage_error("openmoji_combinations", tmp_path).startswith(
        f"openmoji_combinations: no prepared data in {tmp_path}/openmoji/combinations; run mlip prepare-data openmoji"
    )


def test_equal_pictures_accept_each_others_names() -> None:
    names = names_of([("farmer", b"1"), ("robot", b"2"), ("man farmer", b"1"), ("robot", b"3")])
    assert names.texts == ("farmer", "man farmer", "robot")
    assert names.accepted == ((0, 1), (2,), (0, 1), (2,))


# imagenet ------------------------------------------------------------------------------------------------------------


def test_imagenet_from_wordnet_folders(tmp_path: Path) -> None:
    for wnid in WNIDS:
        write(tmp_path / "imagenet" / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", picture())
        write(tmp_path / "imagenet" / "val" / wnid / "._ILSVRC2012_val_00000001.JPEG", "")
    write(tmp_path / "imagenet" / "val" / ".ipynb_checkpoints" / "a.JPEG", picture())
    write(tmp_path / "imagenet" / "val" / WNIDS[0] / "a.heic", "")
    pictures = opened("imagenet", tmp_path)
    assert pictures.passed_over.in_words() == f"1 .heic file (first: {WNIDS[0]}/a.heic)"
    assert labels(pictures) == [0, 1, 999]
    assert len(pictures.class_names) == 1000
    assert len(pictures.templates) == 80
    assert pictures.class_names[0] == "tench"
    assert pictures.templates[0] == "a bad photo of a {c}."


def test_imagenet_from_class_numbers_and_shards(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / "a" / "imagenet" / "val" / f"{i:03d}").mkdir(parents=True)
    (tmp_path / "a" / "imagenet" / "val" / ".ipynb_checkpoints").mkdir()
    write(tmp_path / "a" / "imagenet" / "val" / "002" / "x.jpeg", picture())
    assert labels(opened("imagenet", tmp_path / "a")) == [2]
    root = tmp_path / "b" / "imagenet-1k"
    write(root / "test" / "nshards.txt", "1")
    write(root / "classnames.txt", "\n".join(map(str, range(1000))))
    write(root / "zeroshot_classification_templates.txt", "{c}")
    members = {"x.jpg": picture(), "x.cls": b"7", "x.json": b"{}", "y.jpg": picture(), "y.cls": b"998"}
    write_tar(root / "test" / "0.tar", members)
    assert labels(opened("imagenet", tmp_path / "b")) == [7, 998]


def test_absent_imagenet_says_where_it_was_looked_for(tmp_path: Path) -> None:
    message = usage_error("imagenet", tmp_path)
    assert message.startswith("imagenet: not found; looked for imagenet, imagenet1k, imagenet-1k, ImageNet, ILSVRC")
    assert f"Put the validation pictures into {tmp_path}/imagenet/val/, one folder for each class" in message
    assert "torchvision.datasets.ImageNet makes these folders from ILSVRC2012_img_val.tar" in message
    assert "\n" not in message


def test_imagenet_of_other_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "imagenet" / "val" / "n01440764" / "a.jpg", picture())
    write(tmp_path / "imagenet" / "val" / "n99999999" / "a.jpg", picture())
    message = "imagenet: 'n99999999' is neither one of the 1,000 WordNet ids nor a number below 1000"
    assert usage_error("imagenet", tmp_path) == message


# clip-benchmark ------------------------------------------------------------------------------------------------------


def test_clip_benchmark_builds_from_a_local_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(7):
        write(tmp_path / "fer2013" / "test" / f"class{i}" / "a.jpg", picture())
    pictures = opened("fer2013", tmp_path)
    assert labels(pictures) == list(range(7))
    assert "angry" in pictures.class_names
    assert len(pictures.templates) == 6
    assert capsys.readouterr().out == ""


def test_clip_benchmark_passes_over_hidden_files_and_folders(tmp_path: Path) -> None:
    for i in range(7):
        write(tmp_path / "fer2013" / "test" / f"class{i}" / "a.jpg", picture())
    before = find_benchmark("fer2013", root=tmp_path).fingerprint
    for leftover in ("class1/._a.jpg", "class2/.ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg", ".cache/a.jpg"):
        write(tmp_path / "fer2013" / "test" / leftover, picture())
    assert find_benchmark("fer2013", root=tmp_path).fingerprint == before
    assert labels(opened("fer2013", tmp_path)) == list(range(7))


def test_clip_benchmarks_imagenet_is_read_by_its_wordnet_ids(tmp_path: Path) -> None:
    """torchvision's ImageNet knows a class by each of its English names, so it has more names than folders."""
    root = tmp_path / "imagenet1k"
    for wnid in imagenet_classes():
        write(root / "val" / wnid / "a.JPEG", picture())
    torch.save(({wnid: (f"{wnid} a", f"{wnid} b") for wnid in imagenet_classes()}, []), root / "meta.bin")
    pictures = opened("imagenet1k", tmp_path)
    assert [pictures.load(i)[1] for i in (0, 482, 999)] == [0, 482, 999]
    assert (pictures.num_pictures, pictures.class_names[482]) == (1000, "cassette player")


def test_clip_benchmark_class_count_is_checked(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "fer2013" / "test" / f"class{i}" / "a.jpg", picture())
    message = f"fer2013: 3 class folders in {tmp_path}/fer2013 for 7 classes"
    assert usage_error("fer2013", tmp_path) == message


def test_clip_benchmark_never_downloads(tmp_path: Path) -> None:
    message = usage_error("cifar10", tmp_path)
    assert message.startswith(f"cifar10: nothing in {tmp_path}/cifar10; mlip downloads no evaluation data: put the ")
    write(tmp_path / "cifar10" / "readme", "")
    message = usage_error("cifar10", tmp_path)
    assert message.startswith(
        f"cifar10: {tmp_path}/cifar10 does not hold what clip-benchmark expects: Dataset not found"
    )
    write(tmp_path / "imagenetv2" / "ImageNetV2-matched-frequency" / "0" / "a.jpeg", picture())
    message = usage_error("imagenetv2", tmp_path)
    folder = tmp_path / "imagenetv2" / "ImageNetV2-matched-frequency"
    assert message == f"imagenetv2: 1 of 10,000 pictures in {folder}; unpack them all"


def test_web_shards(tmp_path: Path) -> None:
    root = tmp_path / "wds_vtab-pets"
    write(root / "test" / "nshards.txt", "2\n")
    write(root / "classnames.txt", "cat\ndog\n")
    write(root / "zeroshot_classification_templates.txt", "a {c}\n")
    write_tar(
        root / "test" / "0.tar",
        {"s0.jpg": picture(), "s0.cls": b"1", "s1.webp": picture(format="WEBP"), "s1.cls": b"0"},
    )
    missing = f"wds/vtab/pets: 1 of 2 shards are missing, such as {root}/test/1.tar"
    assert usage_error("wds/vtab/pets", tmp_path) == missing
    write(root / "test" / "nshards.txt", "999999999")
    missing = f"wds/vtab/pets: 999999998 of 999999999 shards are missing, such as {root}/test/1.tar"
    assert usage_error("wds/vtab/pets", tmp_path) == missing
    write(root / "test" / "nshards.txt", "\ufeff2\n")
    write_tar(root / "test" / "1.tar", {"s2.jpg": picture(), "s2.cls": b"2"})
    pictures = opened("wds/vtab/pets", tmp_path)
    assert pictures.class_names == ("cat", "dog")
    with pytest.raises(RunError, match="class 2 in a data set of 2 classes; its labels are wrong"):
        labels(pictures)
    write_tar(root / "test" / "1.tar", {"s2.jpg": picture(), "s2.cls": b"1"})
    assert labels(opened("wds/vtab/pets", tmp_path)) == [1, 0, 1]
    for name, content, message in (
        ("test/nshards.txt", "9" * 30, "not a number of shards"),
        ("zeroshot_classification_templates.txt", "a {}\n", "'a {}' has no {c}; write one template a line"),
        ("classnames.txt", b"caf\xe9\n", "not UTF-8 text"),
    ):
        before = (root / name).read_bytes()
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert usage_error("wds/vtab/pets", tmp_path).startswith(f"{root / name}: {message}")
        (root / name).write_bytes(before)
    cut = (root / "test" / "1.tar").read_bytes()[:1000]
    write(root / "test" / "1.tar", cut)
    with pytest.raises(RunError, match="cut at byte 1000"):
        opened("wds/vtab/pets", tmp_path)
    write(root / "dataset_type.txt", "retrieval")
    message = "wds/vtab/pets: a data set for retrieval; eval-zeroshot needs one for classification"
    assert usage_error("wds/vtab/pets", tmp_path) == message
