"""Options and arguments of the command line that several commands share, and those of average."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlip_cli.terminal.values import (
    checked_measured_run,
    checked_path,
    split_datasets,
    split_weights,
)

MODEL = "Run, checkpoint, open_clip:ARCH:FILE, or folder of OpenCLIP or Hugging Face."
"""Help for a RUN whose weights another program may have written."""

Run = Annotated[
    str | None,
    typer.Argument(metavar="RUN", parser=checked_measured_run, help=f"{MODEL} Default: the newest run in runs/."),
]
Model = Annotated[str, typer.Argument(metavar="RUN", parser=checked_measured_run, help=MODEL)]
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN", parser=checked_measured_run, help=f"{MODEL} Default: the newest run."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Device = Annotated[
    Literal["auto", "cuda", "mps", "cpu"], typer.Option(metavar="NAME", help="auto, cuda, mps (untested) or cpu.")
]
_PRECISIONS = Literal["fp32", "bf16", "fp16"]
Precision = Annotated[
    _PRECISIONS | None,
    typer.Option(
        metavar="NAME",
        help="In which the model computes: fp32, bf16 or fp16 (CUDA). Default: on CUDA that of the run's training, "
        "elsewhere fp32.",
        show_default=False,
    ),
]
ProfiledPrecision = Annotated[
    _PRECISIONS | None,
    typer.Option(
        "--precision", metavar="NAME", help="In place of the recipe's: fp32, bf16 or fp16 (CUDA).", show_default=False
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the blocks or not. Default: as the recipe's training does.",
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        callback=checked_path,
        help="Folder that holds data sets. Default: $MLIP_DATA, else data/.",
        show_default=False,
    ),
]
Datasets = Annotated[
    list[list] | None,
    typer.Option(
        "--dataset",
        parser=split_datasets,
        metavar="NAME[,NAME]",
        help="Data sets. Repeat the option, or separate names by commas.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, max=65_536, help="Pictures in one forward pass.")]

Averaged = Annotated[
    list[str],
    typer.Argument(
        metavar="START TUNED",
        parser=checked_measured_run,
        help=f"The start and what was tuned from it; or more runs. Each: {MODEL[0].lower()}{MODEL[1:]}",
    ),
]
Weights = Annotated[
    list[list] | None,
    typer.Option(
        parser=split_weights,
        metavar="START:END:STEP",
        help="Shares of the second run, also as a list such as 0,0.3,1. Default: 0:1:0.1. Three or more runs have one "
        "average, the uniform one.",
        show_default=False,
    ),
]
Choose = Annotated[
    str | None,
    typer.Option(
        metavar="WEIGHT|best:DATASET", help="The average that --out writes. Default: 0.5.", show_default=False
    ),
]
AverageOut = Annotated[
    Path | None,
    typer.Option(
        "--out", callback=checked_path, help="Run folder to write the chosen average into.", show_default=False
    ),
]
