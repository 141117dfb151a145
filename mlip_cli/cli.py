"""The command line: signatures and help. Each body imports its command and calls it."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mlip_cli import __version__
from mlip_cli.data.download.options import DEFAULTS, DownloadOptions
from mlip_cli.errors import UsageError
from mlip_cli.terminal import options, prepare_options
from mlip_cli.terminal.endings import exit_code
from mlip_cli.terminal.output import start_logging
from mlip_cli.terminal.values import (
    checked_file,
    checked_path,
    checked_run,
    checked_text,
    complete_override,
    complete_recipe,
    flat,
    given_words,
    one_rate,
    split,
    split_rates,
)

app = typer.Typer(
    name="mlip",
    help="Prepare data; pretrain, merge, evaluate and profile CLIP-style models with the method MLIP.",
    epilog="Example: mlip prepare-data openmoji data/openmoji && mlip pretrain openmoji",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"mlip {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: mlip prepare-data openmoji data/openmoji")
def prepare_data(
    context: typer.Context,
    source: prepare_options.Source = None,
    out: prepare_options.Out = None,
    format: prepare_options.Format = "auto",
    size: prepare_options.ShortSide = None,
    holdout: prepare_options.Holdout = None,
    clean: prepare_options.Clean = None,
    min_words: prepare_options.MinWords = None,
    max_words: prepare_options.MaxWords = None,
    min_characters: prepare_options.MinCharacters = None,
    max_characters: prepare_options.MaxCharacters = None,
    min_side: prepare_options.MinSide = None,
    max_aspect: prepare_options.MaxAspect = None,
    min_bytes: prepare_options.MinBytes = None,
    max_bytes: prepare_options.MaxBytes = None,
    dedupe: prepare_options.Dedupe = "none",
    exclude: prepare_options.Exclude = None,
    data_root: options.DataRoot = None,
    limit: prepare_options.Limit = None,
    image_column: prepare_options.ImageColumn = None,
    caption_column: prepare_options.CaptionColumn = None,
    image_folder: prepare_options.ImageFolder = None,
    preset: prepare_options.Preset = None,
    where: prepare_options.Where = None,
    uids: prepare_options.Uids = None,
    captions_from: prepare_options.CaptionsFrom = None,
    damaged: prepare_options.Damaged = "refuse",
    workers: prepare_options.Workers = None,
    engine: prepare_options.EngineName = "processes",
    workspace: prepare_options.LocalFolder = None,
    part: prepare_options.Part = None,
    finish: prepare_options.Finish = False,
    retry_failed: prepare_options.RetryFailed = False,
    check: prepare_options.Check = None,
    timeout: prepare_options.Timeout = DEFAULTS.timeout_s,
    retries: prepare_options.Retries = DEFAULTS.retries,
    connections: prepare_options.Connections = DEFAULTS.connections,
    connections_per_host: prepare_options.ConnectionsPerHost = DEFAULTS.connections_per_host,
    user_agent: prepare_options.UserAgent = DEFAULTS.user_agent,
    ignore_opt_out: prepare_options.IgnoreOptOut = False,
    allow_private: prepare_options.AllowPrivate = False,
    json: options.Json = False,
) -> None:
    """Turn pictures and captions into shards that training reads."""
    if check is not None:
        from mlip_cli.commands.check_data import check_data

        given = given_words(context, but=("check", "workers", "json"))
        return check_data(check, given=given, workers=workers, as_json=json)
    if source is None or out is None:
        missing = "OUT" if source else "SOURCE"
        raise UsageError(f"mlip prepare-data: missing argument '{missing}'; try mlip prepare-data --help")
    from mlip_cli.commands import prepare_data as command
    from mlip_cli.data.prepare.engines import Engine
    from mlip_cli.data.prepare.filters import Cleaning, cleaning_of
    from mlip_cli.data.prepare.job import Asked
    from mlip_cli.data.sources.records import ReadOptions

    rules = Cleaning(
        min_words=min_words,
        max_words=max_words,
        min_characters=min_characters,
        max_characters=max_characters,
        min_side=min_side,
        max_aspect=max_aspect,
        min_bytes=min_bytes,
        max_bytes=max_bytes,
        dedupe=dedupe,
        exclude=tuple(dict.fromkeys(flat(exclude or []))),
    )
    columns = (limit, image_column, caption_column, image_folder)
    asked = Asked(
        source=source,
        out=out,
        format=format,
        read=ReadOptions(*columns, damaged, preset, where, uids, captions_from),
        cleaning=cleaning_of(clean, rules),
        data_root=data_root,
        size=size,
        holdout=holdout,
        engine=Engine(engine, workers),
        workspace=workspace,
        part=part,
        finish=finish,
        retry_failed=retry_failed,
        download=DownloadOptions(
            timeout, retries, connections, connections_per_host, user_agent, ignore_opt_out, allow_private
        ),
    )
    return command.prepare_data(asked, as_json=json)


@app.command(epilog="Example: mlip pretrain recipes/openmoji.yaml train.steps=100")
def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            callback=checked_text,
            autocompletion=complete_recipe,
            help="A recipe file, or the name of a shipped recipe.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            autocompletion=complete_override,
            help="Changes to the recipe, such as optim.lr=1e-3.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=checked_path, help="Run folder to write. Default: runs/RECIPE-TIME.", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out, or else the newest unfinished run of this recipe."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and the data and show what would run, without training.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Train a model by a recipe."""
    from mlip_cli.commands import pretrain as command

    command.pretrain(recipe, overrides or [], out=out, resume=resume, dry_run=dry_run, as_json=json)


@app.command(epilog="Example: mlip merge-sweep --rates 0.3,0.5")
def merge_sweep(
    run: options.Run = None,
    rates: Annotated[
        list[list] | None,
        typer.Option(
            parser=split_rates,
            metavar="R[,R]",
            help="Fractions of the patch tokens to merge away. Default: 0.3,0.5.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        list[list] | None,
        typer.Option(
            parser=split, metavar="M[,M]", help="guided, tome. Default: the recipe's method.", show_default=False
        ),
    ] = None,
    dataset: options.Datasets = None,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = 64,
    rounds: Annotated[
        int, typer.Option(min=5, max=10_000, help="Timed rounds. Each round measures all rates in turn.")
    ] = 9,
    pictures: Annotated[int, typer.Option(min=0, max=1_000, help="Number of pictures to draw merges on; 0: none.")] = 8,
    device: options.Device = "auto",
    precision: options.Precision = None,
    json: options.Json = False,
) -> None:
    """Measure speed and accuracy at several merge rates."""
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
        precision=precision,
        as_json=json,
    )


@app.command(epilog="Example: mlip eval-zeroshot --dataset imagenet")
def eval_zeroshot(
    runs: options.Models = None,
    task: Annotated[
        Literal["zeroshot", "retrieval"],
        typer.Option(
            metavar="NAME",
            help="zeroshot: classification. retrieval: pictures and captions find each other, by default those of the "
            "recipe's data.validation.",
        ),
    ] = "zeroshot",
    dataset: options.Datasets = None,
    merge_rate: Annotated[
        list[list] | None,
        typer.Option(
            parser=split_rates, metavar="R[,R]", help="Merge rates. Default: the recipe's rate.", show_default=False
        ),
    ] = None,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    precision: options.Precision = None,
    json: options.Json = False,
) -> None:
    """Classify pictures by text alone, or measure retrieval."""
    from mlip_cli.commands import eval_zeroshot as command

    command.eval_zeroshot(
        runs or [],
        task=task,
        datasets=flat(dataset or []),
        merge_rates=flat(merge_rate or []),
        data_root=data_root,
        batch_size=batch_size,
        device=device,
        precision=precision,
        as_json=json,
    )


@app.command(epilog="Example: mlip search runs/openmoji 'a red heart' --images data/openmoji")
def search(
    run: options.Model,
    images: Annotated[
        str,
        typer.Option(
            callback=checked_text,
            metavar="PATH",
            help="Pictures to search among: a folder, a table, tars, or what prepare-data wrote.",
        ),
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="What to search for; several texts are several searches.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(parser=checked_file, metavar="FILE", help="Search for pictures like this one. May be repeated."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1_000, help="Number of pictures to show for each search.")] = 10,
    merge_rate: Annotated[
        float | None,
        typer.Option(parser=one_rate, metavar="R", help="Merge rate. Default: the recipe's.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=checked_path, help="Page to write. Default: RUN/search.html.", show_default=False),
    ] = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    precision: options.Precision = None,
    json: options.Json = False,
) -> None:
    """Find the pictures nearest to a text or a picture."""
    from mlip_cli.commands import search as command

    command.search(
        run,
        texts or [],
        image_queries=image or [],
        images=images,
        top=top,
        merge_rate=merge_rate,
        out=out,
        batch_size=batch_size,
        device=device,
        precision=precision,
        as_json=json,
    )


@app.command(epilog="Example: mlip average runs/start runs/tuned --out runs/mixed")
def average(
    runs: options.Averaged,
    weights: options.Weights = None,
    dataset: options.Datasets = None,
    choose: options.Choose = None,
    out: options.AverageOut = None,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    precision: options.Precision = None,
    json: options.Json = False,
) -> None:
    """Average the weights of runs, and measure the averages."""
    from mlip_cli.commands import average as command

    command.average(
        runs,
        weights=None if weights is None else flat(weights),
        datasets=flat(dataset or []),
        choose=choose,
        out=out,
        data_root=data_root,
        batch_size=batch_size,
        device=device,
        precision=precision,
        as_json=json,
    )


@app.command(epilog="Example: mlip export runs/mine exported --format open_clip")
def export(
    run: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", callback=checked_path, help="Folder to write.")],
    format: Annotated[
        Literal["open_clip", "huggingface", "onnx", "safetensors"],
        typer.Option(metavar="NAME", help="open_clip, huggingface, onnx or safetensors (a run without its training)."),
    ] = "open_clip",
    merge_rate: Annotated[
        float | None,
        typer.Option(parser=one_rate, metavar="R", help="For onnx. Default: the recipe's rate.", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Also upload OUT to this repository of Hugging Face.", show_default=False),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a model for OpenCLIP, transformers or onnxruntime."""
    from mlip_cli.commands import export as command

    command.export(run, out, format=format, merge_rate=merge_rate, push=push, as_json=json)


@app.command(epilog="Example: mlip profile recipes/cc12m.yaml")
def profile(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|RECIPE", parser=checked_run, help="Run or recipe to measure. Default: the newest run."
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    rounds: Annotated[int, typer.Option(min=5, max=10_000, help="Timed rounds.")] = 5,
    device: options.Device = "auto",
    precision: options.ProfiledPrecision = None,
    compile: options.Compile = None,
    json: options.Json = False,
) -> None:
    """Measure parameters, GFLOPs, throughput and memory."""
    from mlip_cli.commands import profile as command

    command.profile(
        target,
        batch_size=batch_size,
        rounds=rounds,
        device=device,
        precision=precision,
        is_compiled=compile,
        as_json=json,
    )


@app.command(epilog="Example: mlip report runs/a runs/b")
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", parser=checked_run, help="Run folders; several are compared. Default: the newest run."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=checked_path,
            help="File to write. Default: RUN/report.html; for several runs, comparison.html beside them.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write the page of a run, or a page that compares runs."""
    from mlip_cli.commands import report as command

    command.report(runs or [], out=out, as_json=json)


@app.command(epilog="Example: mlip doctor --json")
def doctor(json: options.Json = False) -> None:
    """Check this machine and this installation."""
    from mlip_cli.commands import doctor as command

    command.doctor(as_json=json)


def main() -> None:
    """Run the command line. An error becomes one line and an exit code."""
    start_logging()
    sys.exit(exit_code(app))
