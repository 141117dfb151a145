"""The parts of a report that show pictures: retrieval both ways, and what merged into one token."""

from collections.abc import Iterable
from pathlib import Path

from mlip_cli.report.page import Html, command, element, embedded_image, figure, folded, note, section, table
from mlip_cli.report.record import Result, RunRecord
from mlip_cli.report.results import with_interval
from mlip_cli.terminal.output import percent, plural

WAYS = (("text_to_image", "text → images"), ("image_to_text", "image → texts"))
AT = (1, 5, 10)
MAPS = (("spatial", "spatial"), ("frequency", "frequency"), ("mixed", "both"))
"""Guidance of a stage, and its words."""


def gallery_section(record: RunRecord) -> Html:
    """Queries drawn at random, what the model finds for them, and recall over the whole set."""
    gallery = record.newest("gallery")
    if gallery is None:
        return section("retrieval", "Retrieval", note(_why_no_gallery(record)))
    scores = gallery["scores"]
    rows = []
    for way, title in WAYS:
        cells = []
        for k in AT:
            cells += [with_interval(scores[way], f"r{k}"), percent(scores[way][f"r{k}_chance"])]
        rows.append([title, *cells])
    columns = ["", *(column for k in AT for column in (f"R@{k} %", "chance"))]
    return section(
        "retrieval",
        "Retrieval",
        element(
            "p",
            f"{plural(gallery['num_images'], 'picture')} and {plural(gallery['num_texts'], 'distinct text')} of the "
            f"validation set, step {gallery['step']:,}, merge rate {gallery['true_merge_rate']:.3f}. A query counts as "
            "right when any of its own is among the first k; ties count against the model.",
        ),
        table(columns, rows),
        note(
            f"The queries below were drawn {gallery['chosen']}, not picked: the five best answers, ✓ right and "
            "✗ wrong, and where none of them is right, → the one that should have come."
        ),
        element("h3", "Text → images"),
        _queries(_text_query(query, record.run.folder) for query in gallery["text_to_image"]),
        element("h3", "Image → texts"),
        _queries(_image_query(query, record.run.folder) for query in gallery["image_to_text"]),
        *(note(text) for text in record.attributions),
    )


def _why_no_gallery(record: RunRecord) -> str:
    if record.recipe is not None and record.recipe.data.validation is None:
        return "The recipe has no data.validation, so nothing was looked up."
    if record.stamp.get("end_reason") == "finished":
        return "The run has no gallery of what it finds."
    return "Training has not come to its end, where this is looked up; mlip pretrain with --resume goes on."


def _queries(queries: Iterable[Html]) -> Html:
    return element("div", *queries, class_="queries")


def _text_query(query: Result, folder: Path) -> Html:
    found = [_answer(answer, answer["caption"], answer["is_right"], folder) for answer in query["found"]]
    if not any(answer["is_right"] for answer in query["found"]):
        own = query["first_right"]
        found.append(_answer(own, f"place {query['rank'] + 1:,}: {own['caption']}", None, folder))
    return element(
        "div",
        element("p", f"“{query['text']}”", class_="asked"),
        element("ol", *found, class_="found"),
        class_="query",
    )


def _answer(answer: Result, words: str, is_right: bool | None, folder: Path) -> Html:
    """A picture that was found, right or wrong, or the right one (None) that was not."""
    kind = "owed" if is_right is None else "right" if is_right else "wrong"
    picture = embedded_image(folder, answer["picture"], alt=answer["caption"], class_=f"is-{kind}")
    return element("li", picture, element("span", words, class_=f"words {kind}"))


def _image_query(query: Result, folder: Path) -> Html:
    answers = [
        element("li", answer["text"], class_="right" if answer["is_right"] else "wrong") for answer in query["found"]
    ]
    if not any(answer["is_right"] for answer in query["found"]):
        words = f"place {query['rank'] + 1:,} of {query['num_candidates']:,}: {query['first_right']['text']}"
        answers.append(element("li", words, class_="owed"))
    return element(
        "div",
        element("div", embedded_image(folder, query["picture"], alt=query["captions"][0]), class_="question"),
        element("ol", *answers, class_="answers"),
        class_="query row",
    )


def merges_section(record: RunRecord) -> Html:
    """What became one token, stage by stage, beside the guidance."""
    result = record.newest("merge_pictures")
    if result is None:
        return section("merging", "Merging", note("No pictures yet: ", command(f"mlip merge-sweep {record.place}")))
    points = [
        folded(_setting(point), *_point(point, record.run.folder), is_open=i == 0)
        for i, point in enumerate(_strongest_first(result))
    ]
    return section(
        "merging",
        "Merging",
        element(
            "p",
            f"Pictures of {result['dataset']}, drawn {result['chosen']}. Patches of one colour are one token, and a "
            "token keeps its colour from stage to stage; untinted patches are still alone. Beside them the guidance "
            "that each merge went by: the brighter a patch, the more it matters and the less it merges.",
        ),
        _legend(result["map_colors"]),
        *points,
        *(note(text) for text in result.get("attribution", [])),
    )


def _legend(colors: list[str]) -> Html:
    """From guidance 0 to 1."""
    bar = element("span", class_="bar", style=f"background: linear-gradient(90deg, {', '.join(colors)})")
    return element("p", "guidance: merges first ", bar, " is kept apart", class_="note")


def _strongest_first(result: Result) -> list[Result]:
    return sorted(result["points"], key=lambda point: -point["true_rate"])


def _setting(point: Result) -> str:
    return f"{point['method']}, rate {point['rate']:g} (true {point['true_rate']:.3f})"


def _point(point: Result, folder: Path) -> list[Html]:
    return [
        element("div", *(_picture(picture, point["stages"], folder) for picture in point["pictures"]), class_="queries")
    ]


def _picture(picture: Result, stages: list[Result], folder: Path) -> Html:
    """One picture with a row a stage: what merged, and the maps that guided it."""
    label = picture["label"] or f"picture {picture['number']}"
    cells = []
    for number, (drawn, stage) in enumerate(zip(picture["stages"], stages, strict=True)):
        cells.append(_panel(folder, picture["image"], label) if number == 0 else element("div"))
        cells.append(_panel(folder, drawn["groups"], f"{stage['tokens']} tokens before block {stage['block']}"))
        maps = [(drawn[key], words) for key, words in MAPS if drawn[key] is not None]
        cells += [_panel(folder, path, words) for path, words in maps]
    return element("div", *cells, class_="merges", style=f"--columns: {len(cells) // len(stages)}")


def _panel(folder: Path, path: str, words: str) -> Html:
    return figure(embedded_image(folder, path, alt=words), words, kind="panel")
