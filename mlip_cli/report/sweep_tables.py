"""The result of `mlip merge-sweep` as tables."""

from collections.abc import Sequence

from mlip_cli.evaluate.results import DIRECTIONS, RetrievalSweep, SweepResult, ZeroshotSweep
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.report.tables import (
    INTERVALS,
    PAIRED_TEST,
    RECALLS_SHOWN,
    VERSUS,
    Cell,
    Table,
    data_words,
    machine_words,
    names_words,
    percent_cell,
    print_tables,
    recall_cell,
    speedup_cell,
    tokens_words,
    versus_cells,
)
from mlip_cli.terminal.output import percent, plural, print_lines, print_prose


def print_sweep(sweep: SweepResult) -> None:
    """Print all tables."""
    print_tables(sweep_tables(sweep))
    for line in failures_words(sweep):
        print_lines("")
        print_prose(line)


def sweep_tables(sweep: SweepResult) -> list[Table]:
    """Speed and tokens of every setting, then the scores on each data set."""
    speeds: list[list[Cell]] = [
        [
            *point.words,
            f"{point.true_rate:.3f}",
            f"{point.gflops:.3g}",
            f"{point.images_per_s:,.1f}",
            speedup_cell(point.speedup, point.speedup_interval),
            f"{point.expected_speedup:.2f}",
            f"{point.peak_memory.gib:.2f}",
        ]
        for point in sweep.points
    ]
    columns = ("method", "rate", "true rate", "GFLOPs", "images/s", "x rate 0 (95 %)", "by FLOPs", "peak GiB")
    notes = [
        f"batch of {sweep.batch_size}, fp32, on {machine_words(sweep)}; "
        f"median of {sweep.rounds} rounds with all settings in turn"
    ]
    scattered = [" ".join(point.words) for point in sweep.points if scatters(point.speedup_interval)]
    if scattered:
        notes.append(
            f"the rounds of {', '.join(scattered)} differ much: the machine had other work; repeat, or raise --rounds"
        )
    tokens = [[*point.words, tokens_words(point.tokens_per_block)] for point in sweep.points]
    tables = [Table(columns, speeds, notes=notes), Table(("method", "rate", "tokens in each block"), tokens)]
    for dataset in sweep.datasets:
        tables += _swept_zeroshot(dataset) if isinstance(dataset, ZeroshotSweep) else _swept_retrieval(dataset)
    return tables


def failures_words(sweep: SweepResult) -> list[str]:
    """A line for each data set that could not be measured."""
    return [f"{own.dataset}: not evaluated: {own.error.removeprefix(f'{own.dataset}: ')}" for own in sweep.failed]


def scatters(interval: Interval) -> bool:
    """True for an interval so wide that the speed-up says little."""
    return interval.high > 1.5 * interval.low


def _swept_zeroshot(dataset: ZeroshotSweep) -> list[Table]:
    first = dataset.points[0]
    rows: list[list[Cell]] = [
        [
            *point.words,
            percent_cell(point.mean_per_class_recall, point.mean_per_class_recall_interval),
            percent_cell(point.acc1, point.acc1_interval),
            recall_cell(point.names, 5),
        ]
        for point in dataset.points
    ]
    notes = [data_words(dataset, first), *([names_words(first.names)] if first.names else [])]
    titles = ("method", "rate", "mean recall %", "top-1 %", "name R@5 %")
    scores = Table(titles, rows, dataset.dataset, notes).without_empty_columns()
    beside: list[list[Cell]] = [
        [*point.words, percent(point.agreement), *versus_cells(point.paired["acc1"])]
        for point in dataset.points
        if point.method
    ]
    won = f"won / lost: pictures that only this setting / only rate 0 classifies correctly; {PAIRED_TEST}"
    columns = ("method", "rate", "same class %", *VERSUS)
    return [scores, *_beside(dataset.dataset, columns, beside, note=won)]


def _swept_retrieval(dataset: RetrievalSweep) -> list[Table]:
    tables = []
    beside: list[list[Cell]] = []
    pairs = f"{plural(dataset.n, 'picture')}, {plural(dataset.num_texts, 'caption')}"
    for way, words in DIRECTIONS.items():
        recalls = [point.recalls[way] for point in dataset.points]
        rows = [
            [*point.words, *(recall_cell(own, k) for k in RECALLS_SHOWN)]
            for point, own in zip(dataset.points, recalls, strict=True)
        ]
        columns = ("method", "rate", *(f"R@{k} %" for k in RECALLS_SHOWN))
        chances = "/".join(f"{percent(recalls[0].at(k).chance)}" for k in RECALLS_SHOWN)
        notes = [f"{pairs}: chance {chances} %; {INTERVALS}"]
        tables.append(Table(columns, rows, f"{dataset.dataset}: {words}", notes))
        beside += [
            [words, *point.words, *versus_cells(point.paired[f"{way}_r5"])] for point in dataset.points if point.method
        ]
    won = f"won / lost: queries that only this setting / only rate 0 answers among the first 5; {PAIRED_TEST}"
    note = f"{won}, where captions of a picture count together"
    return [*tables, *_beside(dataset.dataset, ("direction", "method", "rate", *VERSUS), beside, note=note)]


def _beside(dataset: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str) -> list[Table]:
    """A table of the differences from rate 0; none where there is no other setting."""
    return [Table(columns, rows, f"{dataset}: beside rate 0", [note])] if rows else []
