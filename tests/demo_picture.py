"""README's picture and its table of the demo, from the files of the demo's two runs.

After `make demo`: python tests/demo_picture.py runs .github/demo.png. The table is printed.
"""

import base64
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from browser_for_tests import Browser, browser, find_browser

from mlip_cli.evaluate.results import Recalls, ZeroshotResult
from mlip_cli.report.galleries import gallery_section, merges_section
from mlip_cli.report.headlines import compared, merging_sentence, verdict
from mlip_cli.report.page import Html, element, figure, joined, note, page, section
from mlip_cli.report.record import RunRecord, read_run
from mlip_cli.report.tables import recall_cell
from mlip_cli.report.time_chart import time_chart

MODELS = {"openmoji_clip": "CLIP", "openmoji": "MLIP"}
COLUMNS = ("model", "merge rate", "text to image R@1 %", "R@5 %", "image to text R@1 %", "unseen things R@5 %")
WIDTH = 1080
QUERIES = 2
"""Queries that the picture shows, the first of those that were drawn."""
SHORTER = f"""
nav, footer, section > p:not(.asked), section > .scroll, h2 + p, .note {{ display: none; }}
main {{ display: grid; gap: 0 32px; grid-template-columns: 1fr 1fr; }}
#verdict, #merging {{ grid-column: 1 / 3; }}
h2 {{ border: 0; margin: 0.4em 0; padding: 0.4em 0 0; }}
#verdict h2 {{ display: none; }}
#verdict > p {{ display: block; max-width: none; }}
.wide svg {{ max-width: 720px; }}
.queries {{ display: block; }}
.found {{ grid-template-columns: repeat(6, 1fr); }}
.merges {{ grid-template-columns: repeat(var(--columns), 190px); }}
.query:nth-child(n+{QUERIES + 1}), .merges:nth-child(n+2) {{ display: none; }}
h3, .queries ~ .queries, details ~ details {{ display: none; }}
"""


def main(runs: Path, picture: Path) -> None:
    records = [read_run(runs / name, name=words) for name, words in MODELS.items()]
    for line in table(records):
        print(line)
    path = find_browser()
    if path is None:
        sys.exit("no Chromium here; the picture was not made")
    with tempfile.NamedTemporaryFile(suffix=".html") as file, browser(path) as own:
        Path(file.name).write_text(document(records), encoding="utf-8")
        own.open(Path(file.name), width=WIDTH, scheme="light")
        picture.write_bytes(screenshot(own))


def table(records: list[RunRecord]) -> Iterator[str]:
    """Lines of README's table: the combinations both ways, and names of unseen things, at every merge rate."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{' --- |' * len(COLUMNS)}"
    for record in records:
        found = {(own.dataset, own.merge_rate): own for own in record.all_of(ZeroshotResult)}
        for dataset, rate in sorted(found, key=str):
            if dataset != "openmoji_combinations":
                continue
            asked, hard = found[dataset, rate], found["openmoji", rate]
            cells = [cell(asked.pictures, 1), cell(asked.pictures, 5), cell(asked.names, 1), cell(hard.pictures, 5)]
            yield f"| {record.name} | {rate:g} | {' | '.join(cells)} |"


def cell(recalls: Recalls | None, k: int) -> str:
    return str(recall_cell(recalls, k))


def document(records: list[RunRecord]) -> str:
    """Verdict, accuracy against time, the first queries by each model, and what merged in one picture."""
    chart = time_chart(records)
    first, other = records
    said = verdict(first.name, other.name, compared(records)), merging_sentence(other)
    parts: list[Html] = [element("p", sentence) for sentence in said if sentence]
    parts += [figure(chart.in_page(), kind="wide")] if chart is not None else []
    found = [named(gallery_section(record), f"{record.name} looks for pictures of a text") for record in records]
    whole = page(
        "demo",
        heading="Combinations that training never showed",
        lead="",
        sections=[
            section("verdict", "Verdict", *parts),
            *found,
            named(merges_section(records[-1]), "Patches that became one token"),
        ],
        foot=joined(note(text) for text in records[-1].attributions),
    )
    return whole.replace("</style>", f"{SHORTER}</style>")


def named(own: Html, title: str) -> Html:
    start, _, rest = own.partition("<h2>")
    return Html(f"{start}<h2>{title}</h2>{rest.partition('</h2>')[2]}")


def screenshot(own: Browser) -> bytes:
    height = own.evaluate("document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 2}
    answer = own.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return base64.b64decode(answer["data"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
