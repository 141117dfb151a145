"""The parts of a page that show pictures: retrieval both ways, and what merged into one token."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlip_cli.evaluate.picture_results import (
    DrawnPicture,
    GalleryQuery,
    GalleryResult,
    MergePicturesResult,
    Shown,
    StageTokens,
)
from mlip_cli.evaluate.results import DIRECTIONS
from mlip_cli.report.page import Html, command, details, element, embedded_image, figure, note, section, table
from mlip_cli.report.record import RunRecord
from mlip_cli.report.tables import INTERVALS, RECALLS_SHOWN, Cell, Table, percent_cell
from mlip_cli.terminal.output import percent, plural


def gallery_section(record: RunRecord) -> Html:
    """Queries drawn at random, what the model finds for them, and recall over the whole set."""
    gallery = record.newest(GalleryResult)
    if gallery is None:
        return section("retrieval", "Retrieval", note(_why_no_gallery(record)))
    return section(
        "retrieval",
        "Retrieval",
        element(
            "p",
            f"{plural(gallery.num_images, 'picture')} and {plural(gallery.num_texts, 'distinct text')} of the "
            f"validation set, step {gallery.step:,}, merge rate {gallery.true_merge_rate:.3f}, in "
            f"{gallery.precision}. A query counts as right if one of its own is among the first k; ties count against "
            "the model.",
        ),
        table(recalls_table(gallery)),
        note(
            f"The queries below were drawn {gallery.chosen}. Each shows its five best answers, ✓ right and ✗ wrong. "
            f"If none of them is right, → shows the right answer. {INTERVALS.capitalize()}."
        ),
        element("h3", "Text → images"),
        _queries(_text_query(query, record.run.folder) for query in gallery.text_to_image),
        element("h3", "Image → texts"),
        _queries(_picture_query(query, gallery.num_texts, record.run.folder) for query in gallery.image_to_text),
        *map(note, record.attributions),
    )


def compared_galleries(records: Sequence[RunRecord]) -> Html:
    """The same queries, with what each run finds for them."""
    title = "Retrieval, side by side"
    found = [(record, gallery) for record in records if (gallery := record.newest(GalleryResult)) is not None]
    if len(found) < 2 or len({tuple(gallery.fingerprints) for _, gallery in found}) > 1:
        why = "There are no two runs with retrieval results" if len(found) < 2 else "The runs' validation sets differ"
        return section("retrieval", title, note(f"{why}, so no pictures stand beside each other."))
    _, first = found[0]
    of_texts = [(record, {own.asked.text: own for own in gallery.text_to_image}) for record, gallery in found]
    of_pictures = [(record, {_file(own): own for own in gallery.image_to_text}) for record, gallery in found]
    return section(
        "retrieval",
        title,
        note(f"The queries were drawn {first.chosen}. ✓ right, ✗ wrong; → is the right answer where it was not found."),
        element("h3", "Text → images"),
        _queries(_text_beside(own) for own in _common(of_texts)),
        element("h3", "Image → texts"),
        _queries(_picture_beside(own, first.num_texts) for own in _common(of_pictures)),
        *map(note, dict.fromkeys(text for record, _ in found for text in record.attributions)),
    )


Answers = list[tuple[RunRecord, GalleryQuery]]
"""One query, as each run answers it."""


def _common(by_run: Sequence[tuple[RunRecord, dict[str, GalleryQuery]]]) -> list[Answers]:
    """The queries that every run was asked."""
    asked = [name for name in by_run[0][1] if all(name in own for _, own in by_run)]
    return [[(record, own[name]) for record, own in by_run] for name in asked]


def _file(query: GalleryQuery) -> str:
    """The file of a query's picture; it is named by the picture's number in the validation set."""
    return Path(str(query.asked.picture)).name


def _text_beside(answers: Answers) -> Html:
    rows = [
        part
        for record, query in answers
        for part in (element("p", record.name, class_="note"), _pictures_found(query, record.run.folder))
    ]
    return element("div", element("p", f"“{answers[0][1].asked.text}”", class_="asked"), *rows, class_="query")


def _picture_beside(answers: Answers, num_texts: int) -> Html:
    record, query = answers[0]
    lists = [
        part
        for own, found in answers
        for part in (element("p", own.name, class_="note"), _texts_found(found, num_texts))
    ]
    question = _question(query, record.run.folder)
    return element("div", question, element("div", *lists, class_="answers"), class_="query row")


def recalls_table(gallery: GalleryResult) -> Table:
    """Recall over the whole validation set, both ways, with chance."""
    rows: list[list[Cell]] = []
    for way, words in reversed(DIRECTIONS.items()):
        shares = [gallery.scores[way].at(k) for k in RECALLS_SHOWN]
        cells = [cell for own in shares for cell in (percent_cell(own.value, own.interval), percent(own.chance))]
        rows.append([words, *cells])
    columns = ("direction", *(column for k in RECALLS_SHOWN for column in (f"R@{k} %", "chance")))
    return Table(columns, rows)


def _why_no_gallery(record: RunRecord) -> str:
    if record.recipe is not None and record.recipe.data.validation is None:
        return "The recipe has no data.validation, so there is nothing to retrieve."
    if record.stamp.end_reason == "finished":
        return "The run has no retrieval results."
    go_on = shlex.join(["mlip", "pretrain", str(record.run.recipe), "--out", str(record.run.folder), "--resume"])
    return f"Retrieval is measured at the end of training; {go_on} continues the run."


def _queries(queries: Iterable[Html]) -> Html:
    return element("div", *queries, class_="queries")


def _text_query(query: GalleryQuery, folder: Path) -> Html:
    asked = element("p", f"“{query.asked.text}”", class_="asked")
    return element("div", asked, _pictures_found(query, folder), class_="query")


def _pictures_found(query: GalleryQuery, folder: Path) -> Html:
    found = [_answer(answer, answer.text, folder) for answer in query.found]
    if not any(answer.is_right for answer in query.found):
        own = query.first_right
        found.append(_answer(own, f"place {query.rank + 1:,}: {own.text}", folder))
    return element("ol", *found, class_="found")


def _answer(answer: Shown, words: str, folder: Path) -> Html:
    """A picture that was found, right or wrong, or the right one that was not found."""
    kind = "owed" if answer.is_right is None else "right" if answer.is_right else "wrong"
    picture = embedded_image(folder, str(answer.picture), alt=answer.text, class_=f"is-{kind}")
    return element("li", picture, element("span", words, class_=f"words {kind}"))


def _picture_query(query: GalleryQuery, num_texts: int, folder: Path) -> Html:
    return element("div", _question(query, folder), _texts_found(query, num_texts), class_="query row")


def _question(query: GalleryQuery, folder: Path) -> Html:
    return element("div", embedded_image(folder, str(query.asked.picture), alt=query.asked.text), class_="question")


def _texts_found(query: GalleryQuery, num_texts: int) -> Html:
    answers = [element("li", answer.text, class_="right" if answer.is_right else "wrong") for answer in query.found]
    if not any(answer.is_right for answer in query.found):
        words = f"place {query.rank + 1:,} of {num_texts:,}: {query.first_right.text}"
        answers.append(element("li", words, class_="owed"))
    return element("ol", *answers, class_="answers")


def merges_section(record: RunRecord) -> Html:
    """What became one token, stage by stage, beside the guidance."""
    result = record.newest(MergePicturesResult)
    if result is None:
        return section("merging", "Merging", note("No pictures yet: ", command(f"mlip merge-sweep {record.place}")))
    bar = element("span", class_="bar", style=f"background: linear-gradient(90deg, {', '.join(result.map_colors)})")
    settings = [
        details(
            f"{point.method}, rate {point.rate:g} (true {point.true_rate:.3f})",
            _queries(_stages(picture, point.stages, record.run.folder) for picture in point.pictures),
            is_open=number == 0,
        )
        for number, point in enumerate(sorted(result.points, key=lambda point: -point.true_rate))
    ]
    return section(
        "merging",
        "Merging",
        element(
            "p",
            f"Pictures of {result.dataset}, drawn {result.chosen}. Patches of one colour are one token, and a token "
            "keeps its colour from stage to stage. Untinted patches are tokens of their own. The guidance of each "
            "merge stands beside it: a brighter patch matters more and merges less. Of many merges, three are shown: "
            "the first, the middle and the last.",
        ),
        element("p", "guidance: merges first ", bar, " is kept apart", class_="note"),
        *settings,
        *map(note, result.attribution),
    )


def _stages(picture: DrawnPicture, stages: Sequence[StageTokens], folder: Path) -> Html:
    """One picture with a row a stage: what merged, and the maps that guided it."""
    label = picture.label or f"picture {picture.number}"
    cells = []
    for number, (drawn, stage) in enumerate(zip(picture.stages, stages, strict=True)):
        cells.append(_panel(folder, picture.image, label) if number == 0 else element("div"))
        cells.append(_panel(folder, drawn.groups, f"{stage.tokens} tokens before block {stage.block}"))
        maps = ((drawn.spatial, "spatial"), (drawn.frequency, "frequency"), (drawn.mixed, "both"))
        cells += [_panel(folder, path, words) for path, words in maps if path is not None]
    return element("div", *cells, class_="merges", style=f"--columns: {len(cells) // len(stages)}")


def _panel(folder: Path, path: str, words: str) -> Html:
    return figure(embedded_image(folder, path, alt=words), words, kind="panel")
