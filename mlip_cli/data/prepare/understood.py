"""What a source was taken for, said before the work begins."""

from dataclasses import replace

from mlip_cli.data.prepare.job import Job
from mlip_cli.data.prepare.workspace import Workspace, refuse_links
from mlip_cli.data.sources.formats import DataSource
from mlip_cli.data.sources.listing import PassedOver, is_unread_picture
from mlip_cli.data.sources.rules import list_warnings
from mlip_cli.data.sources.survey import Survey, passed_over, surveyed
from mlip_cli.data.sources.table_layouts import missing_shards
from mlip_cli.paths import escaped
from mlip_cli.terminal.output import say, warn
from mlip_cli.terminal.panel import progress


def understood(job: Job) -> tuple[Job, Survey, PassedOver]:
    """Read the source once and say what was understood.

    Returns:
        The job, whose source knows the rules for its rows; what the source holds; what is not read.
    """
    with progress(None, "counting rows"):
        source, survey = _surveyed(job)
    passed = passed_over(source, survey)
    _say_understood(source, survey, passed)
    return replace(job, source=source), survey, passed


def _surveyed(job: Job) -> tuple[DataSource, Survey]:
    """The source with the rules that the user gave for its rows, and what it holds.

    Raises:
        UsageError, DamagedTarError: as `with_rules` and `surveyed`; nothing is left in OUT.
    """
    work = Workspace(job.out)
    try:
        if job.source.read.captions_from:
            refuse_links(work.out)
        source = job.source.with_rules(work.folder)
        return source, surveyed(source)
    except BaseException:
        work.discard_unbegun()
        raise


def _say_understood(source: DataSource, survey: Survey, passed: PassedOver) -> None:
    """What was understood of the source, the first pairs, what is not read, and what looks wrong."""
    say(f"{source.name}: {source.describe()}; {survey.in_words()}")
    source.notes.tell_readings(source.name, say=say)
    source.notes.tell_damage(source.name, num_tars=len(source.tars()), warn=warn)
    if source.format == "metadata":
        say("; ".join(dict.fromkeys(plan.in_words() for plan in source.table_plans)))
    if survey.first:
        say(f"first: {'; '.join(survey.first)}")
    for text in source.rules.remarks() if source.rules else ():
        say(text)
    if survey.spelled.counts:
        say(survey.spelled.in_words())
    if passed.counts:
        cure = "; convert the pictures among them to JPEG" if any(map(is_unread_picture, source.names)) else ""
        say(f"not read: {passed.in_words()}{cure}")
    if source.is_folder and source.format == "metadata" and (missing := missing_shards(source.tables)):
        warn(missing)
    for name, why in source.unread_tables.items() if source.format == "classes" else ():
        warn(f"{escaped(name)}: not read as a table: {why}")
    for text in list_warnings(source.read, source.rules, num_rows=survey.rows):
        warn(text)
    for text in survey.looks.warnings(are_classes=source.format == "classes"):
        warn(text)
