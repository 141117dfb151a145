"""HTML in one file, without scripts or links to other files. Elements escape their text."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlip_cli.report.tables import Spread, Table
from mlip_cli.terminal.output import is_number

CSS = Path(__file__).with_name("page.css")

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser fetches nothing and runs no script."""

VOID = frozenset({"img", "meta", "br"})
MIME = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


class Html(str):
    """Markup. An element escapes every other string."""

    __slots__ = ()


Child = Any
"""Html, a string, a number, None (nothing), or a sequence of those."""


def element(tag: str, *children: Child, **attributes: str | int | bool | None) -> Html:
    """<tag attributes>children</tag>. `class_` is the attribute class; an attribute of None or False is left out."""
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{joined(children)}</{tag}>")


def joined(children: Iterable[Child]) -> Html:
    """Children one after the other."""
    return Html("".join(_text(child) for child in children))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return str(child)
    if isinstance(child, list | tuple):
        return joined(child)
    return html.escape(str(child))


def section(identifier: str, title: str, *children: Child) -> Html:
    """A section of the page, with an entry in the navigation."""
    return element("section", element("h2", title), *children, id=identifier)


def note(*children: Child) -> Html:
    """A line in a quiet colour."""
    return element("p", *children, class_="note")


def command(text: str) -> Html:
    """A command line to type."""
    return element("code", text)


def table(shown: Table) -> Html:
    """Columns and rows, without title and notes. On a narrow page the table scrolls sideways."""
    columns = [[row[i] for row in shown.rows] for i in range(len(shown.columns))]
    is_text = [not all(isinstance(value, Spread) or is_number(value) for value in column) for column in columns]

    def cells(tag: str, values: Sequence[Child]) -> list[Html]:
        return [
            element(tag, _cell(value), class_=None if text else "number")
            for value, text in zip(values, is_text, strict=True)
        ]

    head = element("thead", element("tr", *cells("th", shown.columns)))
    body = element("tbody", *(element("tr", *cells("td", row)) for row in shown.rows))
    return element("div", element("table", head, body), class_="scroll", tabindex=0)


def _cell(value: Child) -> Child:
    """An interval has a quieter colour than its value; None is a dash."""
    if isinstance(value, Spread):
        return element("span", f"{value.value} ", element("span", f"({value.interval('–')})", class_="note"))
    return "–" if value is None else value


def tables(shown: Iterable[Table]) -> list[Html]:
    """Tables below each other, each with its title and its notes."""
    return [
        part
        for own in shown
        for part in (element("h3", own.title) if own.title else None, table(own), *map(note, own.notes))
        if part is not None
    ]


def definitions(pairs: Iterable[tuple[str, Child]]) -> Html:
    """A list of names and values; a value of None is left out."""
    return element(
        "dl",
        *((element("dt", name), element("dd", value)) for name, value in pairs if value is not None),
        class_="definitions",
    )


def figure(picture: Html, caption: Child = None, *, kind: str = "chart") -> Html:
    """A picture with a caption."""
    return element("figure", picture, element("figcaption", caption) if caption else None, class_=kind)


def figures(children: Iterable[Html]) -> Html:
    """Figures side by side, as many as fit."""
    return element("div", *children, class_="figures")


def details(summary: Child, *children: Child, is_open: bool = False) -> Html:
    """Content that a reader can unfold."""
    return element("details", element("summary", summary), *children, open=is_open)


def embedded_image(folder: Path, name: str, *, alt: str, class_: str | None = None) -> Html:
    """A picture file below `folder`, embedded in the page. A missing one, or one elsewhere, is named instead."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.suffix not in MIME:
        return element("span", f"{alt} (no picture {name})")
    return image(path.read_bytes(), MIME[path.suffix], alt=alt, class_=class_)


def image(content: bytes, mime: str, *, alt: str, class_: str | None = None) -> Html:
    """A picture, embedded in the page."""
    return element("img", src=f"data:{mime};base64,{base64.b64encode(content).decode()}", alt=alt, class_=class_)


def page(title: str, *, heading: Child, lead: Child, sections: Sequence[Html], foot: Child) -> str:
    """A whole document. Sections come from `section`; their titles make the navigation."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", Html(CSS.read_text("utf-8"))),
    )
    body = element(
        "body",
        element("header", element("h1", heading), lead),
        element("nav", *(_link(own) for own in sections)),
        element("main", *sections),
        element("footer", foot),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _link(own: Html) -> Html:
    """A link to a section, by its identifier and title."""
    identifier = own.split('id="', 1)[1].split('"', 1)[0]
    return element("a", Html(own.split("<h2>", 1)[1].split("</h2>", 1)[0]), href=f"#{identifier}")
