"""The command line: signatures and help. A command's body imports its command and calls it."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mlip_cli import __version__
from mlip_cli.terminal.endings import exit_code
from mlip_cli.terminal.output import say, start_logging
from mlip_cli.terminal.values import (
    checked_measured_run,
    checked_run,
    complete_override,
    complete_recipe,
    flat,
    split,
    split_rates,
)

app = typer.Typer(
    name="mlip",
    help="Pretrain, merge, evaluate and profile CLIP-style models by the method MLIP.",
    epilog="Example: mlip prepare-data openmoji data/openmoji && mlip pretrain openmoji",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"mlip {__version__}")
        raise typer.Exit()


Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", parser=checked_measured_run, help="Run folder or checkpoint; default: the newest in runs/."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Device = Annotated[
    Literal["auto", "cuda", "mps", "cpu"], typer.Option(metavar="NAME", help="auto, cuda, mps (untested) or cpu.")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where data sets lie; default: $MLIP_DATA, else data/.", show_default=False)
]
Datasets = Annotated[
    list[list] | None,
    typer.Option("--dataset", parser=split, metavar="NAME[,NAME]", help="Data sets; repeat or separate by commas."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: mlip prepare-data openmoji data/openmoji")
def prepare_data(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, a tar, a pattern of tars, or openmoji.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that receives train/ and validation/ or test/.")],
    format: Annotated[
        str,
        typer.Option(help="auto, openmoji, metadata, sidecar, classes or webdataset; auto: detected from the files."),
    ] = "auto",
    size: Annotated[
        int | None,
        typer.Option(
            min=8, help="Short side of stored pictures in pixels; default 256, openmoji 64.", show_default=False
        ),
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share held out as validation/ when the source has no splits.")
    ] = 0.02,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N records of the source.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the picture's path; default: guessed.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the caption; default: guessed.")] = None,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="openmoji: also the skin-tone variants.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    json: Json = False,
) -> None:
    """Turn pictures and captions into shards that training reads."""
    from mlip_cli.commands import prepare_data as command
    from mlip_cli.data.sources.records import ReadOptions

    command.prepare_data(
        source,
        out,
        format=format,
        read=ReadOptions(limit, image_column, caption_column, skin_tones),
        size=size,
        holdout=holdout,
        workers=workers,
        as_json=json,
    )


@app.command(epilog="Example: mlip pretrain recipes/openmoji.yaml train.steps=100")
def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            autocompletion=complete_recipe,
            help="A recipe file, or the name of a shipped recipe.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            autocompletion=complete_override,
            help="Changes to the recipe, as in optim.lr=1e-3.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/RECIPE-TIME.", show_default=False)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or the newest unfinished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, and check it, without training.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a model by a recipe."""
    from mlip_cli.commands import pretrain as command

    command.pretrain(recipe, overrides or [], out=out, resume=resume, dry_run=dry_run, as_json=json)


@app.command(epilog="Example: mlip merge-sweep --rates 0.3,0.5")
def merge_sweep(
    run: Run = None,
    rates: Annotated[
        list[list] | None,
        typer.Option(
            parser=split_rates,
            metavar="R[,R]",
            help="Fractions of patch tokens to merge away; default: 0.3,0.5.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        list[list] | None,
        typer.Option(parser=split, metavar="M[,M]", help="guided, tome; default: the recipe's.", show_default=False),
    ] = None,
    dataset: Datasets = None,
    data_root: DataRoot = None,
    batch_size: BatchSize = 64,
    rounds: Annotated[int, typer.Option(min=5, help="Timed rounds, each through all rates in turn.")] = 9,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures on which the merges are drawn; 0 for none.")] = 8,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure speed and accuracy at several merge rates."""
    say("loading PyTorch")
    from mlip_cli.commands import merge_sweep as command

    command.merge_sweep(
        run,
        rates=flat(rates or [[0.3, 0.5]]),
        methods=flat(methods or []),
        datasets=flat(dataset or []),
        data_root=data_root,
        batch_size=batch_size,
        rounds=rounds,
        num_pictures=pictures,
        device=device,
        as_json=json,
    )


@app.command(epilog="Example: mlip eval-zeroshot --dataset imagenet")
def eval_zeroshot(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", parser=checked_measured_run, help="Run folders or checkpoints; default: the newest."
        ),
    ] = None,
    dataset: Datasets = None,
    task: Annotated[
        Literal["classification", "pointing"],
        typer.Option(
            metavar="NAME",
            help="classification, or pointing: where in 2 x 2 mosaics of pictures the patch nearest to each name lies.",
        ),
    ] = "classification",
    merge_rate: Annotated[
        list[list] | None,
        typer.Option(
            parser=split_rates, metavar="R[,R]", help="Merge rates; default: the recipe's own.", show_default=False
        ),
    ] = None,
    data_root: DataRoot = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Classify pictures of named data sets by text alone."""
    from mlip_cli.commands import eval_zeroshot as command

    command.eval_zeroshot(
        runs or [],
        task=task,
        datasets=flat(dataset or []),
        merge_rates=flat(merge_rate or []),
        data_root=data_root,
        batch_size=batch_size,
        device=device,
        as_json=json,
    )


@app.command(epilog="Example: mlip profile recipes/cc12m.yaml")
def profile(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN|RECIPE", parser=checked_run, help="What to measure; default: the newest run."),
    ] = None,
    batch_size: BatchSize = 32,
    rounds: Annotated[int, typer.Option(min=5, help="Timed rounds.")] = 5,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Count parameters and GFLOPs, measure throughput and memory."""
    say("loading PyTorch")
    from mlip_cli.commands import profile as command

    command.profile(target, batch_size=batch_size, rounds=rounds, device=device, as_json=json)


@app.command(epilog="Example: mlip report runs/a runs/b")
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", parser=checked_run, help="Run folders; several are compared; default: the newest."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; default: RUN/report.html, of several comparison.html beside them.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make the page of a run, or one that compares runs."""
    from mlip_cli.commands import report as command

    command.report(runs or [], out=out, as_json=json)


@app.command(epilog="Example: mlip doctor --json")
def doctor(json: Json = False) -> None:
    """Check this machine and this installation."""
    from mlip_cli.commands import doctor as command

    command.doctor(as_json=json)


def main() -> None:
    """Run the command line and turn what went wrong into one line and an exit code."""
    start_logging()
    sys.exit(exit_code(app))
