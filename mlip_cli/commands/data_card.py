"""card.html beside prepared.json, written when the data is finished."""

from pathlib import Path

from mlip_cli import __version__
from mlip_cli.data.prepare.summary import CARD_PAGE, Summary
from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import read_object, remove_leftovers, write_text
from mlip_cli.terminal.output import warn


def write_data_card(out: Path, summary: Summary) -> None:
    """Write card.html, unless this very page is there. A failure is told and costs nothing: the data is finished."""
    from mlip_cli.data.prepare.examples import examples_of  # here, because it imports numpy
    from mlip_cli.report.data_card import data_card

    remove_leftovers(out / CARD_PAGE)
    try:
        cards = {split: read_object(out / split / "dataset.json") for split in summary.splits}
        examples = examples_of(out, list(summary.splits))
        written = f"Written by mlip {__version__}, from the files of the prepared data alone."  # always the same bytes
        page = data_card(summary, cards, examples, written=written)
        if not (out / CARD_PAGE).is_file() or (out / CARD_PAGE).read_bytes() != page.encode(
            "utf-8", "backslashreplace"
        ):
            write_text(out / CARD_PAGE, page)
    except (OSError, RunError, UsageError, ValueError) as error:
        warn(f"{out / CARD_PAGE}: not written ({error}); the data is whole, and the same command tries again")
