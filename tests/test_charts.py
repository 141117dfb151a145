"""Charts and pages: what they say is what was given, in the page's colours, escaped."""

import math
import re

import pytest

from mlip_cli.report import canvas, charts
from mlip_cli.report.canvas import literal
from mlip_cli.report.charts import ChartBar, Curve, Dot, bars_chart, curves_chart, dots_chart
from mlip_cli.report.page import CSS, Html, definitions, element, page, section, table, tables
from mlip_cli.report.tables import Spread, Table, print_tables

LINES = [Curve("a", [1, 2, 3], [0.5, None, 0.25]), Curve("b", [1, 2, 3], [0.1, 0.2, 0.3], series=1)]


def drawings() -> list[canvas.Chart]:
    return [
        curves_chart("loss of $x$ & <y>", LINES, x_label="step", levels={"chance": 0.1}),
        dots_chart(
            "accuracy",
            {
                "guided": [
                    Dot("0.5", 1.5, (1.4, 1.6), 34.0, (31.0, 38.0)),
                    Dot("0", 1.0, (1.0, 1.0), 35.0, (32.0, 39.0)),
                ]
            },
            x_label="speed",
            y_label="%",
            chance=11.1,
        ),
        bars_chart(
            "step", [ChartBar("read", 1.5, "3 %", "data"), ChartBar("backward", 40.0, "80 %", "compute")], x_label="ms"
        ),
    ]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_same_chart_has_the_same_bytes(number: int) -> None:
    assert drawings()[number].svg == drawings()[number].svg


def test_bars_below_zero_and_names_in_any_script_are_drawn() -> None:
    svg = bars_chart("rest", [ChartBar("日本語 🙂", -1.0, "-1 %"), ChartBar("b", 4.0, "4 %")], x_label="ms").svg
    assert "-1 %" in svg
    assert "日本語 🙂" in svg


def test_text_of_users_is_neither_a_formula_nor_markup() -> None:
    svg = drawings()[0].svg
    assert "loss of $x$ &amp; &lt;y&gt;" in svg


def test_the_page_defines_every_colour_of_the_charts_for_light_and_dark() -> None:
    style = CSS.read_text()
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
    x, y = charts._thinned(Curve("", range(n), [float(i) for i in range(n)]))
    assert x == y == [3 * i + 1 for i in range(charts.MOST_POINTS)]
    x, y = charts._thinned(LINES[0])
    assert x == [1, 2, 3]
    assert math.isnan(y[1])


def test_a_table_says_the_same_on_the_page_and_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Table(["method", "score %", "p"], [["tome", Spread("31.6", "28.0", "35.4"), None]], "set", ["chance 5 %"])
    print_tables([shown])
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "set",
        "method score % p",
        "tome 31.6 (28.0-35.4) -",
        "chance 5 %",
    ]
    [title, body, note] = tables([shown])
    assert (title, note) == ("<h3>set</h3>", '<p class="note">chance 5 %</p>')
    score = '<td class="number"><span>31.6 <span class="note">(28.0–35.4)</span></span></td>'
    assert f'<tr><td>tome</td>{score}<td class="number">–</td></tr>' in body


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
        sections=[section("a", "A & B", table(Table([evil], [[evil]])), definitions([(evil, evil)]))],
        foot=evil,
    )
    assert "<script" not in written
    assert '<a href="#a">A &amp; B</a>' in written


def test_names_that_no_font_takes_are_escaped() -> None:
    assert literal("caf\udce9\x1b $") == r"caf\udce9\x1b \$"
