"""card.html: what prepare-data made of a source, in one file."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip_cli.data.prepare.examples import Example
from mlip_cli.data.prepare.statistics import CONTEXT_LENGTH, TOKENS, TRUNCATED
from mlip_cli.data.prepare.summary import Summary
from mlip_cli.data.sources.listing import counted
from mlip_cli.paths import escaped, is_url
from mlip_cli.report.data_charts import bins_of_all, cut_off, log_chart, plain_chart
from mlip_cli.report.page import (
    Html,
    command,
    definitions,
    details,
    element,
    figure,
    image,
    joined,
    note,
    page,
    section,
    table,
)
from mlip_cli.report.search_page import WEBP, shortened
from mlip_cli.report.tables import Table
from mlip_cli.terminal.output import plural

MARK = (float(CONTEXT_LENGTH), f"{CONTEXT_LENGTH} tokens, where CLIP cuts")
DUPLICATE = "duplicate"
"""How the reasons of dropped duplicates begin."""
MOST_BARS = 20
CAPTION_LENGTH, NAME_LENGTH = 120, 80
"""Characters of a caption or a name that are shown."""

Cards = Mapping[str, Mapping[str, Any]]
"""What the dataset.json of each split holds."""


def data_card(summary: Summary, cards: Cards, examples: Sequence[Example], *, written: str) -> str:
    """The whole page.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: a dataset.json is damaged.
    """
    name = Path(summary.out).name or summary.out
    num_samples = sum(split.num_samples for split in summary.splits.values())
    lead = f"{plural(num_samples, 'sample')} in {plural(len(summary.splits), 'split')}, from {summary.source}."
    return page(
        f"{_shown(name)} · data · mlip",
        heading=_shown(name),
        lead=[note(_shown(lead))],
        sections=[
            _in_and_out(summary),
            _examples(examples),
            _pictures(cards),
            _captions(cards),
            *_names(cards),
            _made(summary, cards),
        ],
        foot=joined(note(_shown(line)) for line in (written, summary.attribution) if line),
    )


def _shown(text: str) -> str:
    """A text from outside: what turns the direction of writing is shown as an escape."""
    return escaped(text, keep="\n")


def _in_and_out(summary: Summary) -> Html:
    num_samples = sum(split.num_samples for split in summary.splits.values())
    counts = {"pictures": summary.pictures, "samples": num_samples, "rejects": summary.rejects}
    if summary.rows != summary.pictures:
        counts = {"rows": summary.rows, **counts}
    duplicates = sum(n for reason, n in summary.reasons.items() if reason.startswith(DUPLICATE))
    said = f"{plural(duplicates, 'duplicate')} dropped. " if duplicates else ""
    if summary.rejects:
        said += "rejects.parquet names each reject with file, row and reason."
    reasons = [
        element("h3", "Rejects by reason"),
        _bars(summary.reasons, of=summary.pictures),
        note(said),
    ]
    rows = [
        [
            name,
            f"{split.num_samples:,}",
            f"{split.num_shards:,}",
            f"{split.num_bytes / 2**20:,.1f}",
            None if split.distinct_captions is None else f"{split.distinct_captions:,}",
        ]
        for name, split in summary.splits.items()
    ]
    columns = ["split", "samples", "shards", "MiB", "distinct captions"]
    holds = [f"{name}/ holds {split.holds}." for name, split in summary.splits.items() if split.holds]
    if summary.held_out:
        holds.append("validation/ was drawn by the hash of the pixels.")
    passed = ", ".join(counted(n, kind) for kind, n in summary.passed_over.items())
    return section(
        "counts",
        "In and out",
        _bars(counts, of=max(counts.values())),
        reasons if summary.rejects else note("Every picture became a sample."),
        *(note(f"{line}.") for line in (*summary.repeats(), *summary.overlaps())),
        note(_shown(f"Not read, or found by another spelling: {passed}.")) if passed else None,
        element("h3", "Splits"),
        table(Table(columns, rows).without_empty_columns()),
        *map(note, holds),
    )


def _pictures(cards: Cards) -> Html:
    own = {name: bins_of_all(cards.values(), name) for name in ("original_width", "original_height", "width", "height")}
    source = {"width": own["original_width"], "height": own["original_height"]}
    stored = {"width": own["width"], "height": own["height"]}
    charts = [
        ("Size in the source", source, "pixels"),
        ("Stored size", stored, "pixels"),
        ("Aspect ratio", {"": bins_of_all(cards.values(), "aspect_ratio")}, "width / height"),
        ("Stored bytes", {"": bins_of_all(cards.values(), "image_bytes")}, "bytes"),
    ]
    drawn = [
        figure(log_chart(title, bins, x_label=x_label).in_page())
        for title, bins, x_label in charts
        if any(bins.values())
    ]
    formats: Counter[str] = Counter()
    for card in cards.values():
        formats.update(card.get("statistics", {}).get("formats", {}))
    numbers = ("original_width", "original_height", "width", "height", "aspect_ratio", "image_bytes")
    return section(
        "pictures",
        "Pictures",
        note("Stored as: ", ", ".join(f"{name} {n:,}" for name, n in formats.most_common()), ".") if formats else None,
        element("div", *drawn, class_="pairs") if drawn else _no_histograms(),
        _numbers(cards, numbers),
    )


def _captions(cards: Cards) -> Html:
    charts = [
        ("Words of a caption", "words", "words", "captions"),
        ("CLIP tokens of a picture's longest caption", TOKENS, "tokens", "pictures"),
        ("Characters of a caption", "caption_characters", "characters", "captions"),
        ("Captions of a picture", "captions", "captions", "pictures"),
    ]
    drawn = []
    for title, name, x_label, y_label in charts:
        bins = bins_of_all(cards.values(), name)
        if len(bins) > 1:
            shown, hidden = cut_off(bins)
            mark = MARK if name == TOKENS else None
            chart = plain_chart(title, shown, x_label=x_label, y_label=y_label, mark=mark).in_page()
            n = sum(count for _, _, count in hidden)
            words = f"Not drawn: {n:,} above, up to {hidden[-1][1] - 1:,.0f}." if hidden else None
            drawn.append(figure(chart, words))
    numbers = ("words", TOKENS, "caption_characters", "captions")
    return section(
        "captions",
        "Captions",
        *(element("p", _truncated(split, card)) for split, card in cards.items()),
        element("div", *drawn, class_="pairs") if drawn else _no_histograms(),
        _numbers(cards, numbers),
    )


def _truncated(split: str, card: Mapping[str, Any]) -> str:
    statistics = card.get("statistics", {})
    share, distinct = statistics.get(TRUNCATED), statistics.get("distinct_captions")
    words = []
    if share is not None:
        words.append(f"{100 * share:.2f} % of the pictures have a caption of more than {CONTEXT_LENGTH} tokens")
    if distinct is not None:
        error = statistics.get("distinct_captions_standard_error", 0)
        about = f", estimated with a standard error of {100 * error:.1f} %" if error else ""
        words.append(f"{plural(distinct, 'distinct caption')}{about}")
    return f"{split}/: {'; '.join(words)}." if words else f"{split}/: nothing was counted."


def _no_histograms() -> Html:
    return note("An earlier version prepared this data; it wrote no histograms.")


def _numbers(cards: Cards, names: Iterable[str]) -> Html:
    """Minimum, median, mean and maximum of each number in each split."""
    rows = [
        [name.replace("_", " "), split, *(f"{own[key]:,}" for key in ("min", "median", "mean", "max"))]
        for name in names
        for split, card in cards.items()
        if (own := card.get("statistics", {}).get(name)) is not None
    ]
    return details("Numbers", table(Table(["", "split", "min", "median", "mean", "max"], rows)))


def _names(cards: Cards) -> Iterator[Html]:
    """The most frequent classes, hosts and licences over all splits, where there are any."""
    kinds = {"domains": "Hosts of the pictures", "licences": "Licences", "classes": "Classes"}
    parts: list[Html] = []
    for kind, title in kinds.items():
        statistics = [card.get("statistics", {}) for card in cards.values()]
        counts: Counter[str] = Counter()
        for own in statistics:
            counts.update(own.get(kind, {}))
        if not counts:
            continue
        top = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_BARS])
        num_names = max(own.get(f"num_{kind}", 0) for own in statistics)
        under = sum(own.get("undercounts", {}).get(kind, 0) for own in statistics)
        words = [f"The {len(top)} most frequent of about {num_names:,}." if num_names > len(top) else ""]
        words.append(f"A count may be {under:,} too low." if under else "")
        total = sum(card.get("num_samples", 0) for card in cards.values())
        parts.append(element("div", element("h3", title), _bars(top, of=total), note(" ".join(filter(None, words)))))
    if parts:
        yield section("names", "Where they come from", element("div", *parts, class_="opening"))


def _bars(counts: Mapping[str, int], *, of: int) -> Html:
    """A bar for each name; the whole width is the largest count. `of` is what shares are taken of."""
    largest = max([1, *counts.values()])
    values = [f"{n:,}" + (f" ({100 * n / of:.1f} %)" if of and n != of else "") for n in counts.values()]
    room = f"min-width: {max(map(len, values), default=0)}ch"  # the same on each line, so that bars compare
    rows = []
    for (name, n), value in zip(counts.items(), values, strict=True):
        fill = element("i", class_="fill", style=f"width: {100 * n / largest:.2f}%; background: var(--series-1)")
        rows.append(
            element(
                "div",
                element("span", _shown(shortened(name, NAME_LENGTH)), class_="bar-name"),
                element("span", fill, class_="track"),
                element("span", value, class_="bar-value", style=room),
                class_="bar-row",
            )
        )
    return element("div", *rows, class_="bars")


def _examples(examples: Sequence[Example]) -> Html:
    """The contact sheet."""
    cells = []
    for own in examples:
        first = _shown(shortened(own.captions[0], CAPTION_LENGTH))
        more = f" (+{len(own.captions) - 1})" if len(own.captions) > 1 else ""
        place = f"{own.split}/ {own.key}"
        shown = element("span", "(no picture)") if own.picture is None else image(own.picture, WEBP, alt=first)
        text = element("span", element("bdi", first), more, class_="words", title=_shown(place))
        cells.append(element("li", shown, text))
    return section(
        "examples",
        "Examples",
        note(f"{len(examples)} samples, drawn by a fixed permutation of all."),
        element("ol", *cells, class_="found matches"),
    )


def _made(summary: Summary, cards: Cards) -> Html:
    """The arguments, the tool, and what proves which data this is."""
    provenance: Mapping[str, Any] = next((card.get("provenance", {}) for card in cards.values()), {})
    check = () if is_url(summary.out) else (f"mlip prepare-data --check {summary.out}",)
    request = [(name.replace("_", " "), _value(value)) for name, value in summary.request.items() if value is not None]
    return section(
        "made",
        "How it was made",
        definitions(
            [
                ("tool", provenance.get("tool")),
                ("source", _shown(summary.source)),
                *request,
                ("list", provenance.get("list")),
                ("licence", provenance.get("license") or provenance.get("licence")),
                ("attribution", summary.attribution),
                ("seconds", f"{summary.seconds:,.0f}"),
            ]
        ),
        element("h3", "Fingerprints"),
        definitions((name, split.fingerprint) for name, split in summary.splits.items()),
        element("h3", "Commands"),
        *(element("p", f"train, with {need}: ", command(line)) for need, line in summary.next.items()),
        *(element("p", "check every byte: ", command(line)) for line in check),
    )


def _value(value: object) -> str:
    if isinstance(value, list):
        return _shown(", ".join(map(str, value)))
    return "yes" if value is True else _shown(str(value))
