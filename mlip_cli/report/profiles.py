"""The result of `mlip profile`: as tables, notes and bars on a terminal, and on the page of a run."""

import sys
from collections.abc import Iterable, Mapping

from mlip_cli.evaluate.results import SweepResult
from mlip_cli.profiling.result import ProfileResult, StepPart
from mlip_cli.report.canvas import Chart
from mlip_cli.report.charts import ChartBar, bars_chart
from mlip_cli.report.headlines import shown_setting, speed_words
from mlip_cli.report.page import Html, command, figure, note, section, tables
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import Cell, Table, machine_words, print_tables, speedup_cell, tokens_words
from mlip_cli.terminal.output import per_second, percent, plural

BREAKDOWN = "profile"
"""Name of a chart file."""

BAR_WIDTH = 24
"""Characters of a bar over the whole step."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def print_profile(profile: ProfileResult) -> None:
    """Print tables and notes, with bars for the parts of the step."""
    print_tables([*model_tables(profile), *_step_tables(profile)], notes=profile_notes(profile))


def model_tables(profile: ProfileResult) -> list[Table]:
    """Parameters, operations, speeds."""
    parameters = Table(("part", "parameters"), [[name, f"{count:,}"] for name, count in profile.parameters.items()])
    return [parameters, *_operations(profile), _speeds(profile), *_token_losses(profile)]


def _operations(profile: ProfileResult) -> list[Table]:
    flops = profile.gflops
    decimals = 2 if flops.image_tower_unmerged >= 1 else 4

    def row(name: str, unmerged: float, merged: float) -> list[Cell]:
        return [name, f"{unmerged:.{decimals}f}", f"{merged:.{decimals}f}" if profile.merging else None]

    unmerged, merged = flops.image_tower_unmerged_by_part, flops.image_tower_by_part
    tower = Table(
        ("GFLOPs an image", "rate 0", f"rate {profile.merging.rate:.2f}" if profile.merging else ""),
        [
            *(row(name, unmerged[name], merged[name]) for name in merged),
            row("image tower", flops.image_tower_unmerged, flops.image_tower),
        ],
        notes=[f"patch tokens in each block: {tokens_words(profile.tokens_per_block)}"],
    )
    beside = {
        "frequency branch, in training": flops.frequency_branch,
        "token heads, in training": flops.token_heads,
        f"text tower, {profile.caption_tokens} tokens": flops.text_tower,
        f"text tower, {profile.context_length} tokens": flops.text_tower_at_context_length,
    }
    others = Table(
        ("beside the image tower", "GFLOPs"),
        [[name, f"{gflops:.{decimals}f}"] for name, gflops in beside.items() if gflops],
        notes=[_caption_tokens(profile)],
    )
    return [tower.without_empty_columns(), others]


def _caption_tokens(profile: ProfileResult) -> str:
    mean = profile.caption_tokens_in_step
    step = "" if mean is None or mean == profile.caption_tokens else f", {mean:.1f} on average in the step's groups"
    return f"tokens of a caption: {profile.caption_tokens} ({profile.caption_tokens_from}){step}"


def _token_losses(profile: ProfileResult) -> list[Table]:
    """Each token loss with the right pictures and with others, where they were compared."""
    if not profile.token_losses:
        return []
    rows: list[list[Cell]] = [[own.loss, f"{own.right:.3f}", f"{own.other:.3f}"] for own in profile.token_losses]
    note = "a loss that is as low with another picture does not look at the picture"
    pairs = profile.token_losses[0].pairs
    return [Table((f"token loss, {pairs} training pairs", "its picture", "another"), rows, notes=[note])]


def _speeds(profile: ProfileResult) -> Table:
    rows: list[list[Cell]] = [
        [own.part, f"{own.per_s:,.1f}", _milliseconds(own.median_s, 1), speedup_cell(own.speedup, own.speedup_interval)]
        for own in profile.speed
    ]
    how = f"{profile.precision}, compiled" if profile.compiled else profile.precision
    return Table((f"batch of {profile.batch_size}, {how}", "per s", "ms", "x rate 0 (95 %)"), rows)


def _step_tables(profile: ProfileResult) -> list[Table]:
    """The parts of the step. Loader processes have a table of their own, since their work adds nothing to the step."""
    rest = profile.unaccounted
    rows = _shares(part for part in profile.breakdown if part.in_step)
    rows.append(["unaccounted", _milliseconds(rest.seconds, 2), percent(rest.share), bar(rest.share)])
    rows.append(["whole step", _milliseconds(profile.whole_s, 2), percent(1.0), None])
    apart = _shares(part for part in profile.breakdown if not part.in_step)
    shown = [Table(("part of a training step", "ms", "%", "share"), rows)]
    if apart:
        num_processes = profile.data.loader_processes if profile.data else 0
        who = plural(num_processes, "loader process", "loader processes")
        shown.append(Table((f"a batch, by {who}", "ms", "%", "of the step's time"), apart))
    return shown


def _shares(parts: Iterable[StepPart]) -> list[list[Cell]]:
    return [[part.part, _milliseconds(part.seconds, 2), percent(part.share), bar(part.share)] for part in parts]


def _milliseconds(seconds: float, decimals: int) -> str:
    return f"{1000 * seconds:,.{decimals}f}"


def bar(share: float) -> str:
    """A share of the step as a bar of block characters, or of # where stdout is not UTF-8; at most the whole."""
    width = min(max(share, 0.0), 1.0) * BAR_WIDTH
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        return "#" * round(width)
    full, eighth = divmod(round(8 * width), 8)
    return ("█" * full + EIGHTHS[eighth]).rstrip()


def profile_notes(profile: ProfileResult) -> list[str]:
    """What limits the step, what the clocks cost, utilisation, memory, machine: a line each."""
    matmul = next(own for own in profile.matmul if own.precision == profile.precision)
    memory, micro = profile.peak_memory, profile.micro_batch_size
    return [
        f"limit: {profile.limit.part}, {profile.limit.why}",
        f"unaccounted: {_milliseconds(profile.unaccounted.outside_s, 2)} ms lie outside of all parts; "
        "the rest is there because medians do not add up",
        f"cost of the clocks: {percent(profile.clocks_cost)} %; without them the step takes "
        f"{_milliseconds(profile.step_s, 1)} ms",
        *([f"micro-batches of {micro}: the first forward pass has no graph"] if micro is not None else []),
        f"model FLOPs utilisation {percent(profile.mfu)} %: {per_second(profile.step_tflops)} of "
        f"{per_second(profile.matmul_peak_tflops)}, measured beside the step on {profile.precision} products of "
        f"{matmul.shape[0]:,} x {matmul.shape[1]:,} matrices",
        f"peak memory of the training step: {memory.gib:.2f} GiB ({memory.measured})",
        f"on {machine_words(profile)}",
    ]


def profile_section(record: RunRecord, charts: Mapping[str, Chart]) -> Html:
    """The time of each part of a training step, and the cost of the model."""
    profile = record.newest(ProfileResult)
    if profile is None:
        return section("profile", "Profile", note("Not measured yet: ", command(f"mlip profile {record.place}")))
    return section(
        "profile",
        "Profile",
        figure(charts[BREAKDOWN].in_page(), kind="wide"),
        *map(note, profile_notes(profile)),
        *tables(model_tables(profile)),
        *map(note, _other_speed(record, profile)),
    )


def _other_speed(record: RunRecord, profile: ProfileResult) -> list[str]:
    """A line on the speed-up of the merge sweep, where this page has both."""
    sweep = record.newest(SweepResult)
    point = shown_setting(record, sweep) if sweep is not None else None
    if sweep is None or point is None or profile.merging is None:
        return []
    return [
        f"The speed-up in the opening of this page is the merge sweep's, of batches of {sweep.batch_size} in "
        f"{sweep.precision} with all settings in turn: at rate {point.true_rate:.2f} {speed_words(point)}. The one "
        f"above is this profile's, of batches of {profile.batch_size} in {profile.precision}."
    ]


def profile_charts(record: RunRecord) -> dict[str, Chart]:
    """The chart that is written as a file too: milliseconds of each part of a step and of the loader's work."""
    profile = record.newest(ProfileResult)
    if profile is None:
        return {}
    bars = [
        ChartBar(
            part.part,
            1000 * part.seconds,
            f"{percent(part.share)} %",
            part.group if part.in_step else "data, in loader processes",
        )
        for part in profile.breakdown
    ]
    rest = profile.unaccounted
    bars.append(ChartBar("unaccounted", 1000 * rest.seconds, f"{percent(rest.share)} %"))
    title = f"{record.name}: a training step of {profile.batch_size} pairs, part by part"
    return {BREAKDOWN: bars_chart(title, bars, x_label="ms (and % of the step)")}
