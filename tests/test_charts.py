"""Charts and pages: what they say is what was given, in the page's colours, escaped."""

import math
import re

import pytest

from mlip_cli.report import canvas, charts
from mlip_cli.report.charts import Bar, Dot, Line, bars_chart, dots_chart, lines_chart
from mlip_cli.report.page import STYLE, Html, element, facts, page, section, table

LINES = [Line("a", [1, 2, 3], [0.5, None, 0.25]), Line("b", [1, 2, 3], [0.1, 0.2, 0.3], series=1)]


def drawings() -> list[canvas.Picture]:
    return [
        lines_chart("loss of $x$ & <y>", LINES, x_label="step", levels={"chance": 0.1}),
        dots_chart(
            "accuracy",
            {"guided": [Dot("0.5", 1.5, (1.4, 1.6), 34.0, (31.0, 38.0)), Dot("0", 1.0, None, 35.0, None)]},
            x_label="speed",
            y_label="%",
            chance=11.1,
        ),
        bars_chart("step", [Bar("read", 1.5, "3 %", "data"), Bar("backward", 40.0, "80 %", "compute")], x_label="ms"),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_chart_takes_the_colours_of_its_place(number: int) -> None:
    picture = drawings()[number]
    placed, file = picture.in_page(), picture.as_file()
    stand_ins = set(canvas.VARIABLES)
    assert stand_ins & set(re.findall("#[0-9a-f]{6}", picture.svg)), "drawn without a colour of the page"
    for text in (placed, file):
        assert not stand_ins & set(re.findall("#[0-9a-f]{6}", text))
    assert "var(--series-1)" in placed
    assert "var(" not in file
    assert not re.search(r"https?://(?!www\.w3\.org/)", placed), "nothing but names of namespaces"
    assert placed.startswith("<svg ")
    assert "<metadata" not in placed


@pytest.mark.parametrize("number", range(3))
def test_the_same_chart_has_the_same_bytes(number: int) -> None:
    assert drawings()[number].svg == drawings()[number].svg


def test_bars_below_zero_and_names_in_any_script_are_drawn() -> None:
    svg = bars_chart("rest", [Bar("日本語 🙂", -1.0, "-1 %"), Bar("b", 4.0, "4 %")], x_label="ms").svg
    assert "-1 %" in svg
    assert "日本語 🙂" in svg


def test_text_of_users_is_neither_a_formula_nor_markup() -> None:
    svg = drawings()[0].svg
    assert "loss of $x$ &amp; &lt;y&gt;" in svg


def test_the_page_defines_every_colour_of_the_charts_for_light_and_dark() -> None:
    style = STYLE.read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for variable in canvas.VARIABLES.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert f"{name}:" in light.split("}")[0]
        assert f"{name}:" in dark.split("}")[0] + dark.split("}")[1]
    for stand_in, colour in canvas.LIGHT.items():
        name = canvas.VARIABLES[stand_in].removeprefix("var(").removesuffix(")")
        assert f"{name}: {colour};" in light, "a file looks like the page by day"


def test_long_lines_are_drawn_as_means_and_gaps_stay_gaps() -> None:
    n = 3 * charts.MOST_POINTS
    x, y = charts._thinned(Line("", range(n), [float(i) for i in range(n)]))
    assert x == y == [3 * i + 1 for i in range(charts.MOST_POINTS)]
    x, y = charts._thinned(LINES[0])
    assert x == [1, 2, 3]
    assert math.isnan(y[1])


def test_elements_escape_everything_but_markup() -> None:
    evil = '"><script>alert(1)</script>'
    assert element("p", evil, Html("<b>"), 3, None, ["&"]) == (
        "<p>&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;<b>3&amp;</p>"
    )
    assert element("img", src=evil, hidden=True, alt=None) == (
        '<img src="&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;" hidden>'
    )
    written = page(
        evil,
        heading=evil,
        lead=evil,
        sections=[section("a", "A & B", table([evil], [[evil]]), facts([(evil, evil)]))],
        foot=evil,
    )
    assert "<script" not in written
    assert '<a href="#a">A &amp; B</a>' in written
