"""Options and arguments of `mlip prepare-data`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlip_cli.terminal.values import (
    checked_path,
    checked_place,
    checked_text,
    split_datasets,
)

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        show_default=False,
        callback=checked_text,
        help="A folder, a table, a tar (.tar.gz too), a pattern of tars, or openmoji.",
    ),
]
Out = Annotated[
    str | None,
    typer.Argument(
        metavar="OUT",
        show_default=False,
        callback=checked_place,
        help="Folder to write train/ and validation/ or test/ into, or a URL, such as s3://bucket/folder.",
    ),
]
Check = Annotated[
    Path | None,
    typer.Option(
        "--check",
        metavar="DIR",
        callback=checked_path,
        help="In place of SOURCE and OUT: check every byte of what was prepared in DIR, or of one split of it.",
        show_default=False,
    ),
]
Format = Annotated[
    str,
    typer.Option(help="auto, openmoji, metadata, sidecar, classes or webdataset; auto: detected from the files."),
]
ShortSide = Annotated[
    int | None,
    typer.Option(
        min=8,
        max=4_096,
        help="Short side of stored pictures, in pixels. Default: 256; openmoji: 64.",
        show_default=False,
    ),
]
Holdout = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.5,
        help="Share of the pictures to hold out as validation/, if the source has no splits. Default: a tenth; of "
        "more than 5,000 pictures 500; of more than 25,000 a fiftieth.",
        show_default=False,
    ),
]
Clean = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        help="Published rules for pictures and captions: datacomp_basic, cc12m or coyo. The options below change them.",
        show_default=False,
    ),
]
MinWords = Annotated[int | None, typer.Option(min=0, help="Fewest words of a caption.", show_default=False)]
MaxWords = Annotated[int | None, typer.Option(min=1, help="Most words of a caption.", show_default=False)]
MinCharacters = Annotated[int | None, typer.Option(min=0, help="Fewest characters of a caption.", show_default=False)]
MaxCharacters = Annotated[int | None, typer.Option(min=1, help="Most characters of a caption.", show_default=False)]
MinSide = Annotated[int | None, typer.Option(min=0, help="Shortest side of a picture, in pixels.", show_default=False)]
MaxAspect = Annotated[
    float | None,
    typer.Option(min=1.0, help="Longest side of a picture, as a multiple of its shorter side.", show_default=False),
]
MinBytes = Annotated[int | None, typer.Option(min=0, help="Fewest bytes of a picture.", show_default=False)]
MaxBytes = Annotated[int | None, typer.Option(min=1, help="Most bytes of a picture.", show_default=False)]
Dedupe = Annotated[
    str,
    typer.Option(
        metavar="none|bytes|pixels|near:R",
        help="Leave out rows that repeat the picture of an earlier row: its bytes, also its pixels, or also its look, "
        "by R of 64 bits of a perceptual hash, 0 to 4, for photographs.",
    ),
]
Exclude = Annotated[
    list[list] | None,
    typer.Option(
        parser=split_datasets,
        metavar="NAME[,NAME]",
        help="Keep the pictures of evaluation sets out of training: imagenet, folder:PATH, shards:PATH, or validation "
        "and test, the splits of the source itself.",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, max=10**12, help="Use only the first N rows of the source.")]
ImageColumn = Annotated[
    str | None,
    typer.Option(help="Column that holds the picture's path, or its field in a tar. Default: found by its name."),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:WEIGHT][,...]",
        help="Column that holds the caption, or its key in a tar's KEY.json; several columns of a table, with "
        "weights: title:2,text. Default: found by its name.",
    ),
]
ImageFolder = Annotated[
    str | None,
    typer.Option(
        callback=checked_text, help="Folder that paths in a table are relative to. Default: found, or the table's."
    ),
]
Damaged = Annotated[
    str,
    typer.Option(
        callback=checked_text,
        help="What a damaged tar does: refuse ends the work; use-start uses the samples before the damage.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, max=1_024, help="Number of processes. Default: one for each core.")]
EngineName = Annotated[
    Literal["processes", "ray"],
    typer.Option(
        metavar="NAME",
        help="What does the work: processes of this machine, or ray: the cluster that $RAY_ADDRESS names, else a Ray "
        "that runs as long as the command.",
    ),
]
LocalFolder = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        callback=checked_path,
        help="Where data for a URL are made before they are uploaded; they stay there. Default: a folder in the "
        "cache, which is removed in the end.",
        show_default=False,
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Prepare the I-th of N shares, beside N - 1 machines that prepare the others. Then --finish.",
        show_default=False,
    ),
]
Finish = Annotated[bool, typer.Option("--finish", help="Make the shards, once every share has been prepared.")]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Try the rejects of OUT again that can pass: no answer, broken downloads, missing pictures.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A published list, read by its columns: cc3m, cc12m, yfcc15m_v1, yfcc15m_v2, redcaps, datacomp, laion or "
        "coyo.",
        show_default=False,
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="CONDITION",
        help="Rows of a table to take, by its columns, such as 'similarity > 0.3 and punsafe < 0.5'.",
        show_default=False,
    ),
]
Uids = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        callback=checked_text,
        help="Rows of a table to take, by their uid: DataComp's .npy, or a text with a uid a line.",
        show_default=False,
    ),
]
CaptionsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="[add:]FILE",
        help="Table of captions that take the place of a row's own (add: are added), joined by uid, key, sha256, url, "
        "image_id or id. Rows that it does not name keep their own.",
        show_default=False,
    ),
]

Timeout = Annotated[
    float,
    typer.Option(min=0.1, max=3_600, metavar="SECONDS", help="Time for one try of a download."),
]
Retries = Annotated[
    int,
    typer.Option(min=0, max=20, help="More tries of a download after a time-out, a lost connection or a busy server."),
]
Connections = Annotated[int, typer.Option(min=1, max=16_384, help="Downloads at a time, of all workers together.")]
ConnectionsPerHost = Annotated[
    int,
    typer.Option(min=1, max=1_024, help="Downloads at a time from one host; each worker has one at least."),
]
UserAgent = Annotated[str, typer.Option(metavar="NAME", help="How downloads name themselves.")]
IgnoreOptOut = Annotated[
    bool,
    typer.Option(
        "--ignore-opt-out",
        help="Take pictures whose owner opts out by X-Robots-Tag or TDM-Reservation.",
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private",
        help="Download from private networks and from this machine too.",
    ),
]
