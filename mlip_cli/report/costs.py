"""What a training cost: steps, samples and time, from metrics.jsonl and run.json."""

from collections.abc import Iterator, Mapping, Sequence

from mlip_cli.evaluate.results import SweepResult
from mlip_cli.report.headlines import shown_setting
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import Cell, Table, speedup_cell
from mlip_cli.terminal.output import clock

TIMES = (
    "Time of the steps: from the speeds in metrics.jsonl, without evaluations and checkpoints. CPU time: of rank 0 and "
    "its loader processes, with both; other work on the machine changes it less. Speed: of the image tower at the "
    "recipe's merging, by merge-sweep."
)

LOSSES = (
    "Compare losses only between recipes with the same batch, terms and weights: the loss of guessing is ln(batch)."
)


def training_seconds(record: RunRecord) -> Iterator[tuple[int, float]]:
    """(step, seconds of training until then) of each logged line; evaluations do not count.

    The speed of a line is that since the line before, over all ranks.
    """
    seconds, before = 0.0, 0
    for line in record.steps:
        samples, speed = line.get("samples_seen"), line.get("images_per_s")
        if not samples or not speed:
            continue
        seconds += (samples - before) / speed
        before = samples
        yield int(line["step"]), seconds


def steps_s(record: RunRecord) -> float | None:
    """Seconds that the steps took; None where no speed is logged."""
    return max((seconds for _, seconds in training_seconds(record)), default=None)


def cpu_s(record: RunRecord) -> float | None:
    """CPU seconds of all sessions; None where one of them has not written its time."""
    own = [session.cpu_s for session in record.stamp.sessions]
    return None if not own or None in own else sum(seconds for seconds in own if seconds is not None)


def samples_seen(record: RunRecord) -> int:
    """Samples that the steps took, repeated ones too."""
    return int(record.steps[-1].get("samples_seen") or 0) if record.steps else 0


def equal_terms(records: Sequence[RunRecord]) -> str:
    """Whether the runs were trained on the same data, on as many samples."""
    datas = {tuple(sorted(record.stamp.data.values())) for record in records}
    seen = [samples_seen(record) for record in records]
    same_data = len(datas) == 1 and datas != {()}
    if same_data and len(set(seen)) == 1:
        return f"{'Both' if len(seen) == 2 else 'All'} saw {seen[0]:,} samples of the same data."
    data = "the same data" if same_data else "data that differs"
    return f"They saw {', '.join(f'{number:,}' for number in seen)} samples of {data}, so more than the method differs."


def costs_table(records: Sequence[RunRecord], *, heads: Mapping[str, Sequence[Cell]]) -> Table:
    """A row for each run.

    Args:
        heads: the cells of each run that stand first: its name and its method.
    """
    rows: list[list[Cell]] = []
    for record in records:
        stamp, batch = record.stamp, record.recipe.train.global_batch_size if record.recipe is not None else None
        devices = dict.fromkeys(session.device for session in stamp.sessions if session.device)
        took, used, sweep = steps_s(record), cpu_s(record), record.newest(SweepResult)
        point = shown_setting(record, sweep) if sweep is not None else None
        merges = record.recipe is not None and record.recipe.model.merging is not None
        rows.append(
            [
                *heads[record.name],
                f"{record.last_step:,}",
                None if batch is None else f"{batch:,}",
                f"{samples_seen(record):,}",
                clock(took) if took is not None else None,
                clock(used) if used is not None else None,
                ", ".join(devices) or None,
                speedup_cell(point.speedup, point.speedup_interval) if point is not None and merges else None,
                record.last_loss,
                stamp.end_reason or "not ended",
            ]
        )
    times = ("time of the steps", "CPU time", "device", "speed, × unmerged")
    columns = ("run", "method", "steps", "batch", "samples seen", *times, "loss", "ended")
    return Table(columns, rows, notes=[TIMES, LOSSES]).without_empty_columns()
