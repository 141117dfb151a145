"""Every reader shows the same pixels of a file: preparing, training and evaluation, with simplejpeg and without."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from shards_for_tests import give_checksums
from test_benchmarks import opened, write, write_tar
from test_data_faults import write_shard

from mlip_cli.data import pictures as module
from mlip_cli.data.loader import decoded
from mlip_cli.data.open import open_prepared, open_sources
from mlip_cli.data.pictures import (
    ORIENTATIONS,
    RejectedPictureError,
    jpeg_decoder,
    open_picture,
    pillow_to_rgb,
    to_array,
    to_rgb,
)
from mlip_cli.data.prepare.pixels import hash_pixels, store
from mlip_cli.recipe.config import Source

HEIGHT, WIDTH = 12, 20
ORIENTATION = ExifTags.Base.Orientation


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: object) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


WEBP_BOMB = b'RIFF\x1c\0\0\0WEBPVP8L\x0f\0\0\0/\xfe\xff\xcf\x07\x07\x10\xfd\x8f\xfe\x07"\xa2\xff\x01\0'
"""131 megapixels of one colour."""


def turned(orientation: int, format: str, **options: Any) -> bytes:
    """A file that shows `picture()` to those who apply its orientation."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = picture().transpose(ORIENTATIONS[inverse]) if inverse in ORIENTATIONS else picture()
    return encoded(stored, format, exif=exif(orientation), **options)


def exif_behind_the_pixels(png: bytes) -> bytes:
    """The same PNG with its eXIf chunk behind its IDAT chunk."""
    at = png.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(png[at : at + 4])
    tail = png.index(b"IEND") - 4
    return png[:at] + png[end:tail] + png[at:end] + png[tail:]


def as_pillow_shows(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


def png_of(header: tuple[int, int, int, int], rows: Sequence[bytes], *, wrong_checksum: bool = False) -> bytes:
    """A PNG from (width, height, bits, kind of colour) and its packed rows. The checksum is zlib's, not PNG's."""
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    packed = packed[:-1] + bytes([packed[-1] ^ wrong_checksum])
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def gray_png(bits: int) -> tuple[bytes, np.ndarray]:
    """Grey of 1, 2, 4 or 8 bits, and the pixels: the levels spread over 0 to 255."""
    levels = np.random.default_rng(bits).integers(0, 1 << bits, (HEIGHT, WIDTH), dtype=np.uint8)
    places = np.unpackbits(levels[..., None], axis=2)[..., -bits:]
    rows = [np.packbits(row).tobytes() for row in places.reshape(HEIGHT, -1)]
    return png_of((WIDTH, HEIGHT, bits, 0), rows), colored(levels * (255 // ((1 << bits) - 1)))


def deep_color_png(kind: int, channels: int) -> tuple[bytes, np.ndarray]:
    """16 bits a channel: Pillow drops the lower 8, which is at most one level below scaling. Alpha is whole."""
    values = np.random.default_rng(kind).integers(0, 1 << 16, (HEIGHT, WIDTH, channels)).astype(">u2")
    if channels in (2, 4):
        values[..., -1] = 0xFFFF
    shown = (values >> 8).astype(np.uint8)
    return png_of((WIDTH, HEIGHT, 16, kind), [row.tobytes() for row in values]), (
        shown[..., :3] if channels > 2 else colored(shown[..., 0])
    )


def colored(gray: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(gray[..., None], 3, axis=2)


def ycck_jpeg(image: Image.Image) -> dict[str, bytes]:
    """As Photoshop writes CMYK; Pillow cannot write it."""
    if module.simplejpeg_decode is None:
        return {}
    from simplejpeg import encode_jpeg

    inks = 255 - np.asarray(image.convert("CMYK"))  # upside down, as Photoshop has them
    return {"ycck.jpg": encode_jpeg(inks, quality=95, colorspace="CMYK", colorsubsampling="444")}


def corpus() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name of a file -> its bytes and the pixels it shows."""
    whole, hidden = np.asarray(picture()), np.asarray(picture()).copy()
    hidden[:, :9] = 255
    rgba = picture().convert("RGBA")
    rgba.paste((10, 200, 30, 0), (0, 0, 9, HEIGHT))
    palette = Image.fromarray(hidden).quantize(16)
    keyed = palette.getpixel((0, 0))
    shown = np.asarray(palette.convert("RGB")).copy()
    shown[np.asarray(palette) == keyed] = 255
    levels = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    scaled = np.repeat(np.rint(levels / 257).astype(np.uint8)[..., None], 3, axis=2)
    deep = Image.fromarray(levels)
    gray_alpha = Image.merge("LA", (picture().convert("L"), rgba.getchannel("A")))
    gray_on_white = np.where(np.asarray(rgba)[..., 3:] == 0, 255, colored(np.asarray(picture().convert("L"))))
    frames: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "red")]}
    gif = palette.convert("RGB").quantize(16)
    jpegs = {f"turned_{n}.jpg": turned(n, "JPEG", quality=90) for n in range(1, 9)} | {
        "nowhere.jpg": encoded(picture(), "JPEG", exif=exif(9)),
        "cmyk.jpg": encoded(picture().convert("CMYK"), "JPEG"),
        "gray.jpg": encoded(picture().convert("L"), "JPEG"),
        "really_a_jpeg.png": encoded(picture(), "JPEG", progressive=True),
        "lossy.webp": encoded(picture(), "WEBP", quality=80),
        "cmyk.tif": encoded(picture().convert("CMYK"), "TIFF"),
        **ycck_jpeg(picture()),
    }
    return (
        {name: (content, as_pillow_shows(content)) for name, content in jpegs.items()}
        | {f"turned_{n}.tif": (turned(n, "TIFF"), whole) for n in range(1, 9)}
        | {
            "turned_and_packed.tif": (turned(6, "TIFF", compression="tiff_adobe_deflate"), whole),
            "turned_6.png": (turned(6, "PNG"), whole),
            "turned_8.png": (exif_behind_the_pixels(turned(8, "PNG")), whole),
            "turned_5.webp": (turned(5, "WEBP", lossless=True), whole),
            "palette.png": (encoded(palette, "PNG", transparency=keyed), shown),
            "rgba.png": (encoded(rgba, "PNG"), hidden),
            "rgba.webp": (encoded(rgba, "WEBP", lossless=True), hidden),
            "deep.png": (encoded(deep, "PNG"), scaled),
            "deep.tif": (encoded(deep, "TIFF"), scaled),
            "animated.gif": (encoded(gif, "GIF", **frames), np.asarray(gif.convert("RGB"))),
            "animated.webp": (encoded(picture(), "WEBP", lossless=True, **frames), whole),
            "see_through.gif": (encoded(palette, "GIF", transparency=keyed), shown),
            "gray_and_alpha.png": (encoded(gray_alpha, "PNG"), gray_on_white.astype(np.uint8)),
            "packed.tif": (encoded(picture(), "TIFF", compression="tiff_lzw"), whole),
            "pages.tif": (encoded(picture(), "TIFF", **frames), whole),
            "bits.tif": (encoded(picture().convert("1"), "TIFF"), np.asarray(picture().convert("1").convert("RGB"))),
            **{f"gray_{bits}.png": gray_png(bits) for bits in (1, 2, 4, 8)},
            **{f"deep_{kind}.png": deep_color_png(kind, channels) for kind, channels in ((2, 3), (4, 2), (6, 4))},
            "plain.bmp": (encoded(picture(), "BMP"), whole),
            "really_a_tiff.jpg": (turned(3, "TIFF"), whole),
        }
    )


CORPUS = corpus()


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each decoder of JPEGs in turn."""
    if request.param == "pillow":
        monkeypatch.setattr(module, "simplejpeg_decode", None)
    elif module.simplejpeg_decode is None:
        pytest.skip("simplejpeg is not installed")
    return str(request.param)


def as_prepared(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    """Hashes: what is stored of a JPEG is a JPEG again, and differs a little."""
    return [store(content, size=256).pixels for content in contents]


def shards_of(folder: Path, contents: Sequence[bytes]) -> Path:
    """Prepared shards with pictures that prepare-data would not have stored."""
    stand_ins = [b"\xff\xd8\xff" + bytes([i] * (len(content) - 3)) for i, content in enumerate(contents)]
    [tar] = write_shard(folder / "x", stand_ins, label="a").glob("*.tar")
    members = tar.read_bytes()
    for stand_in, content in zip(stand_ins, contents, strict=True):
        members = members.replace(stand_in, content)
    tar.write_bytes(members)
    give_checksums(tar)
    return tar.parent


def as_trained_on_from_shards(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    dataset = open_prepared(shards_of(folder, contents))
    return [hashed(decoded(dataset.read(i))) for i in range(len(contents))]


def as_trained_on_from_tars(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    pictures = {f"{i:02d}.jpg": content for i, content in enumerate(contents)}
    texts = {f"{i:02d}.txt": b"words" for i in range(len(contents))}
    write_tar(folder / "0.tar", dict(sorted((pictures | texts).items())))
    [dataset] = open_sources([Source(path=str(folder / "0.tar"), format="webdataset")])
    return [hashed(decoded(dataset.read(i))) for i in range(len(contents))]


def as_evaluated(name: str, folder: Path, numbers: Sequence[int]) -> list[Any]:
    pictures = opened(name, folder)
    return [hashed(pictures.load(pictures.items[i])[0]) for i in numbers]


def in_class_folders(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    for i, (name, content) in enumerate(zip(CORPUS, contents, strict=True)):
        write(folder / f"{i % 2}" / f"{i:02d}_{name}", content)
    even, odd = (range(first, len(contents), 2) for first in (0, 1))
    order = [*even, *odd]
    return as_evaluated(f"folder:{folder}", folder, [order.index(i) for i in range(len(contents))])


def in_imagenet(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    for i, (name, content) in enumerate(zip(CORPUS, contents, strict=True)):
        write(folder / "imagenet" / "val" / "n01440764" / f"{i:02d}_{name}", content)
    return as_evaluated("imagenet", folder, range(len(contents)))


def in_prepared_shards(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    return as_evaluated(f"shards:{shards_of(folder, contents)}", folder, range(len(contents)))


def in_web_shards(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    members: dict[str, bytes] = {}
    for i, content in enumerate(contents):
        members |= {f"{i:02d}.jpg": content, f"{i:02d}.cls": b"0"}
    root = folder / "wds_mine"
    write_tar(root / "test" / "0.tar", members)
    texts = (("test/nshards.txt", "1"), ("classnames.txt", "a"), ("zeroshot_classification_templates.txt", "{c}"))
    for name, text in texts:
        write(root / name, text)
    return as_evaluated("wds/mine", folder, range(len(contents)))


def in_clip_benchmarks_folders(folder: Path, contents: Sequence[bytes]) -> list[Any]:
    for i in range(7):
        write(folder / "fer2013" / "test" / f"class{i}" / "z.png", contents[0])
    for i, content in enumerate(contents):
        write(folder / "fer2013" / "test" / "class0" / f"{i:02d}.png", content)
    return as_evaluated("fer2013", folder, range(len(contents)))


def hashed(pixels: Any) -> int:
    """uint8 (3, H, W) -> the hash that prepare-data makes of the same pixels."""
    return hash_pixels(Image.fromarray(pixels.permute(1, 2, 0).numpy()))


READERS = (
    as_prepared,
    as_trained_on_from_shards,
    as_trained_on_from_tars,
    in_class_folders,
    in_imagenet,
    in_prepared_shards,
    in_web_shards,
    in_clip_benchmarks_folders,
)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("read", READERS)
def test_every_reader_shows_the_same_pixels(read: Callable[[Path, Sequence[bytes]], list[Any]], tmp_path: Path) -> None:
    found = read(tmp_path, [content for content, _ in CORPUS.values()])
    wanted = [hash_pixels(Image.fromarray(pixels)) for _, pixels in CORPUS.values()]
    assert [name for name, a, b in zip(CORPUS, found, wanted, strict=True) if a != b] == []


def test_prepared_pictures_are_exact_but_for_jpegs() -> None:
    wrong = []
    for name, (content, pixels) in CORPUS.items():
        stored = store(content, size=256)
        assert (stored.format == "jpg") == (content[:2] == b"\xff\xd8"), name
        if stored.format != "jpg" and not np.array_equal(to_array(open_picture(stored.content)), pixels):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_prepared_jpegs_are_close(mode: str) -> None:
    """JPEG is stored as JPEG of quality 92: less than two of 255 levels off on average, where there is no noise."""
    content = encoded(picture().resize((160, 96), Image.Resampling.BICUBIC).convert(mode), "JPEG", quality=95)
    off = to_array(open_picture(store(content, size=256).content)).astype(int) - as_pillow_shows(content)
    assert np.abs(off).mean() < 2


def test_inks_are_what_photoshop_means_by_them() -> None:
    """Light is 255 - ink, in CMYK and in YCCK."""
    red = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(to_array(open_picture(red)).astype(int) - (255, 0, 0)).max() <= 2
    for content in ycck_jpeg(picture(64, 48)).values():
        assert Image.open(io.BytesIO(content)).info["adobe_transform"] == 2
        assert np.abs(to_array(open_picture(content)).astype(int) - np.asarray(picture(64, 48))).mean() < 2


PNG_WITH_WRONG_CHECKSUM = png_of((WIDTH, HEIGHT, 8, 2), [bytes(3 * WIDTH)] * HEIGHT, wrong_checksum=True)
SOUND = encoded(picture(), "PNG")


def test_a_png_with_a_wrong_checksum_is_named_by_every_reader_and_kills_no_process(tmp_path: Path) -> None:
    """In a process of its own: there are decoders that end in a segmentation fault."""
    code = (
        "import sys; sys.path.append('tests'); import test_pictures as t; from pathlib import Path\n"
        "t.CORPUS = dict.fromkeys(('sound.png', 'damaged.png'))\n"
        "for number, read in enumerate(t.READERS):\n"
        "    Path(sys.argv[1], str(number)).mkdir()\n"
        "    try: print(read(Path(sys.argv[1], str(number)), [t.SOUND, t.PNG_WITH_WRONG_CHECKSUM]))\n"
        "    except Exception as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "damaged picture: broken data stream" not in line] == []
    assert len(lines) == len(READERS)


@pytest.mark.parametrize("name", ["turned_6.jpg", "turned_6.tif", "turned_8.png", "deep.png", "rgba.webp"])
def test_pictures_that_others_opened_look_the_same_and_are_turned_once(name: str) -> None:
    content, pixels = CORPUS[name]
    opened_by_others = pillow_to_rgb(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(opened_by_others), pixels)
    assert np.array_equal(np.asarray(pillow_to_rgb(opened_by_others)), pixels)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("name", CORPUS)
def test_the_size_is_known_upright_before_a_jpeg_is_decoded(name: str) -> None:
    content, pixels = CORPUS[name]
    found = open_picture(content)
    assert (found.height, found.width) == pixels.shape[:2]
    assert to_array(found).flags.writeable


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": False}, {"exif": exif(1)}])
@pytest.mark.parametrize(("width", "height"), [(1, 300), (513, 65)])
def test_the_size_of_a_webp_is_known_before_pillow_takes_memory_for_it(
    options: dict[str, Any], width: int, height: int
) -> None:
    assert module._webp_size(encoded(picture(width, height), "WEBP", **options)) == (width, height)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_a_picture_as_it_is_stored() -> None:
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(to_rgb(open_picture(content))), as_pillow_shows(encoded(picture(), "JPEG")))


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert to_rgb(open_picture(encoded(rgba, "PNG"))).getpixel((0, 0)) == (255, 127, 127)
    gray = Image.new("LA", (8, 8), (0, 0))
    assert to_rgb(open_picture(encoded(gray, "PNG"))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not a picture: not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b"", "not a picture: not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b"\0\0\0 ftypavif\0", "not a picture: AVIF, not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b"\0\0\0 ftypheic\0", "not a picture: HEIC, not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b'<?xml version="1.0"?><Error>', "not a picture: XML, not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b'\xef\xbb\xbf {"error": 1}', "not a picture: JSON, not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b"\n<!DOCTYPE HTML><p>", "not a picture: a web page, not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b'<?xml version="1.0"?>\n<svg width="3"/>', "not a picture: SVG, not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (encoded(picture(), "PPM"), "not a picture: not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (b"\xff\xd8\xff\xd9", "not a picture: not JPEG, PNG, WEBP, GIF, BMP or TIFF"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "unknown range of values: mode F"),
        (encoded(Image.new("1", (8001, 8000)), "PNG"), "picture too large: 8,001 x 8,000 pixels, over 64 megapixels"),
        (encoded(Image.new("1", (20_000, 10_000)), "PNG"), "picture too large: over 64 megapixels"),
        (WEBP_BOMB, "picture too large: 16,383 x 8,000 pixels, over 64 megapixels"),
    ],
)
@pytest.mark.usefixtures("decoder")
def test_a_file_that_cannot_be_used_says_why(content: bytes, message: str) -> None:
    with pytest.raises(RejectedPictureError) as error:
        to_array(open_picture(content))
    assert str(error.value) == message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_is_cut_off_is_damaged(format: str) -> None:
    content = encoded(picture(200, 150), format)
    with pytest.raises(RejectedPictureError, match=r"^damaged picture: [^\n]+$"):
        to_array(open_picture(content[: len(content) // 2]))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "read", [lambda content: store(content, size=8), lambda content: to_array(open_picture(content))]
)
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_rejects_a_picture_and_never_crashes(read: Callable[[bytes], object]) -> None:
    random = np.random.default_rng(0)
    rejected = 0
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(picture(), format)
        for _ in range(60):
            content = bytearray(whole)
            for at in random.integers(0, len(content), 3):
                content[at] = random.integers(0, 256)
            try:
                read(bytes(content[: random.integers(1, len(content) + 1)]))
            except RejectedPictureError:
                rejected += 1
    assert rejected > 100


def test_pillow_reads_what_simplejpeg_refuses_and_says_why(decoder: str) -> None:
    """Superfluous bytes, over which simplejpeg stumbles."""
    plain = encoded(picture(), "JPEG")
    reasons: list[str] = []
    found = to_array(open_picture(plain[:-2] + b"\x17" * 40 + plain[-2:]), on_fallback=reasons.append)
    assert np.array_equal(found, to_array(open_picture(plain)))
    assert [bool(reason) for reason in reasons] == ([True] if decoder == "simplejpeg" else [])


def test_a_picture_that_no_decoder_reads_is_damaged_and_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not in the mood")

    monkeypatch.setattr(module, "simplejpeg_decode", refuse)
    reasons: list[str] = []
    plain = encoded(picture(), "JPEG")
    assert np.array_equal(to_array(open_picture(plain), on_fallback=reasons.append), as_pillow_shows(plain))
    with pytest.raises(RejectedPictureError, match=r"^damaged picture: image file is truncated"):
        to_array(open_picture(plain[:-20]), on_fallback=reasons.append)
    assert reasons == ["not in the mood"]


def test_the_decoder_of_jpegs_has_a_name(decoder: str) -> None:
    assert jpeg_decoder().split()[0] == decoder
    assert jpeg_decoder().split()[1][0].isdigit()


@pytest.mark.usefixtures("decoder")
def test_large_jpegs_come_smaller_and_never_too_small() -> None:
    content = encoded(picture(320, 240), "JPEG")
    for least, shape in (
        ((120, 120), (120, 160)),
        ((121, 10), (240, 320)),
        ((30, 41), (60, 80)),
        ((300, 9), (240, 320)),
    ):
        found = to_array(open_picture(content), least=least)
        assert found.shape[:2] == shape
        halved = Image.open(io.BytesIO(content))
        halved.draft("RGB", shape[::-1])
        assert np.array_equal(found, np.asarray(halved)), "both decoders make the same smaller picture"
    for whole in (encoded(picture(320, 240), "WEBP"), turned(6, "JPEG"), encoded(picture().convert("CMYK"), "JPEG")):
        assert np.array_equal(to_array(open_picture(whole), least=(2, 2)), to_array(open_picture(whole)))
