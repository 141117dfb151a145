"""What a search found: as tables on a terminal, and as a page of thumbnails."""

from collections.abc import Sequence

from mlip_cli.evaluate.search_results import Match, Query, SearchResult, Thumbnails
from mlip_cli.report.page import Html, element, image, joined, note, page, section
from mlip_cli.report.tables import Cell, Table, print_tables
from mlip_cli.terminal.output import plural

WEBP = "image/webp"
TITLE_LENGTH, SHOWN_LENGTH = 80, 400
"""Characters of a query above its table and on the page."""
WORDS = {True: "seen", False: "new", None: None}
"""Whether training saw a picture."""


def shortened(text: str, length: int) -> str:
    """A text on one line; what is too long ends with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def result_words(result: SearchResult) -> str:
    """What was searched, and with what."""
    words = f"{plural(result.num_pictures, 'picture')} of {result.images}"
    model = f"{result.run}, step {result.step:,}, merge rate {result.true_merge_rate:.3f}, in {result.precision}"
    return f"{words}, searched with {model}"


def cut_words(query: Query) -> str | None:
    """A sentence about a query that the model does not read to its end."""
    return f"the query was cut to {query.cut_to} tokens, which is all that this model reads" if query.cut_to else None


def search_tables(result: SearchResult) -> list[Table]:
    """A table for each query, the nearest picture first."""
    columns = ("rank", "cosine", "training", "picture", "caption")
    tables = []
    for query in result.queries:
        rows: list[Sequence[Cell]] = [
            [own.rank, f"{own.cosine:.4f}", WORDS[own.was_trained_on], own.picture, _caption(own)]
            for own in query.found
        ]
        notes = [words for words in (cut_words(query),) if words]
        tables.append(Table(columns, rows, shortened(query.words, TITLE_LENGTH), notes).without_empty_columns())
    return tables


def print_search(result: SearchResult) -> None:
    """Print the tables."""
    notes = [result_words(result), result.trained_on]
    if result.passed_over:
        notes.append(f"passed over: {result.passed_over}")
    print_tables(search_tables(result), notes=notes)


def search_page(result: SearchResult, thumbnails: Thumbnails, *, written: str) -> str:
    """The whole page: a section for each query."""
    lead = [note(f"{result_words(result)}. Below each picture stands its cosine to the query."), note(_legend(result))]
    if result.passed_over:
        lead.append(note(f"Passed over: {result.passed_over}."))
    answers = zip(result.queries, thumbnails.asked, thumbnails.found, strict=True)
    sections = [_section(number, query, asked, found) for number, (query, asked, found) in enumerate(answers, start=1)]
    return page(
        f"search · {result.run} · mlip",
        heading=f"Search in {result.images}",
        lead=lead,
        sections=sections,
        foot=joined(note(line) for line in [written, *result.attribution]),
    )


def _legend(result: SearchResult) -> Html:
    """What the marks mean."""
    if all(own.was_trained_on is None for query in result.queries for own in query.found):
        return joined([f"{result.trained_on[0].upper()}{result.trained_on[1:]}."])
    marks = (
        element("span", "training showed it", class_="is-seen"),
        ", ",
        element("span", "it did not", class_="is-new"),
    )
    return joined([*marks, f". {result.trained_on[0].upper()}{result.trained_on[1:]}."])


def _section(number: int, query: Query, asked: bytes | None, found: Sequence[bytes | None]) -> Html:
    cut = cut_words(query)
    question = None if asked is None else element("div", image(asked, WEBP, alt=query.words), class_="question")
    shown = (
        element("p", shortened(query.words, SHOWN_LENGTH), class_="asked") if len(query.words) > TITLE_LENGTH else None
    )
    matches = [_match(own, picture) for own, picture in zip(query.found, found, strict=True)]
    return section(
        f"query-{number}",
        shortened(query.words, TITLE_LENGTH),
        element("div", question, class_="row") if question else None,
        shown,
        note(f"{cut[0].upper()}{cut[1:]}.") if cut else None,
        element("ol", *matches, class_="found matches"),
    )


def _match(own: Match, picture: bytes | None) -> Html:
    words = _caption(own) or own.picture
    mark = None if own.was_trained_on is None else "is-seen" if own.was_trained_on else "is-new"
    shown = element("span", "(no picture)") if picture is None else image(picture, WEBP, alt=words, class_=mark)
    return element(
        "li",
        shown,
        element("span", f"{own.rank}: {own.cosine:.3f}", class_=f"words {mark}" if mark else "words"),
        element("span", words, class_="words", title=own.picture),
    )


def _caption(own: Match) -> str | None:
    return None if own.caption is None else shortened(own.caption, TITLE_LENGTH)
