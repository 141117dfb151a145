"""img2dataset's work on local files, in its own environment: this file imports nothing of ours.

    $IMG2DATASET_PYTHON img2dataset_peer.py FOLDER OUT SIZE QUALITY

For each line that comes in, all JPEGs of FOLDER go through its resizer and its writer of tars, with what its downloader
does between the two by default (EXIF, SHA-256, fields); the CPU seconds go out.
"""

import hashlib
import io
import json
import sys
import time
from pathlib import Path

CAPTION = "a photo of the red dog on green grass near two small cats"
COLUMNS = ("url", "caption", "key", "status", "error_message", "exif", "sha256")
SIZES = ("width", "height", "original_width", "original_height")


def pass_through(paths: list[Path], out: Path, *, size: int, quality: int) -> None:
    import exifread
    import pyarrow as pa
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    schema = pa.schema([*((name, pa.string()) for name in COLUMNS), *((name, pa.int32()) for name in SIZES)])
    resizer = Resizer(size, "keep_ratio", False, encode_quality=quality)
    writer = WebDatasetSampleWriter(0, str(out), True, 5, schema, "jpg")
    for number, path in enumerate(paths):
        stream = io.BytesIO(path.read_bytes())
        image, *sizes, error = resizer(stream)
        assert error is None, f"{path}: {error}"
        stream.seek(0)
        exif = {name: str(value).strip() for name, value in exifread.process_file(stream, details=False).items()}
        stream.seek(0)
        key = f"{number:09d}"
        meta = {
            "url": str(path),
            "caption": CAPTION,
            "key": key,
            "status": "success",
            "error_message": None,
            "exif": json.dumps(exif),
            "sha256": hashlib.sha256(stream.read()).hexdigest(),
            **dict(zip(SIZES, sizes, strict=True)),
        }
        writer.write(image, key, CAPTION, meta)
    writer.close()


def serve(folder: Path, out: Path, *, size: int, quality: int) -> None:
    paths = sorted(folder.glob("*.jpg"))
    for _ in sys.stdin:
        start = time.process_time()
        pass_through(paths, out, size=size, quality=quality)
        print(f"cpu_s {time.process_time() - start}", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), size=int(sys.argv[3]), quality=int(sys.argv[4]))
