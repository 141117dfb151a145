"""What people see, on real terminals and through real pipes; the training panel is in test_drawing.py."""

import re
from pathlib import Path

import pytest
from terminals_for_tests import in_pipe, on_terminal, screen

from mlip_cli.terminal import output


def test_a_command_to_copy_is_not_folded() -> None:
    command = "mlip pretrain recipes/openmoji.yaml " + " ".join(f"data.key_{i}=value" for i in range(9))
    received, _ = on_terminal(f"output.say({command!r})\noutput.say_to_copy({command!r})")
    assert received.count(command) == 1
    assert max(map(len, received.splitlines()[:-1])) <= 80


def test_progress_is_drawn_on_a_terminal_only() -> None:
    code = """
    with drawing.progress(3, "reading [bold]x[/bold]") as bar:
        bar.advance(0)
        output.say("one [red]line")
        bar.refresh()
    """
    assert in_pipe(code).stderr == "one [red]line\n"
    assert in_pipe(code, FORCE_COLOR="1").stderr == "one [red]line\n"
    received, _ = on_terminal(code)
    assert "reading [bold]x[/bold]" in received
    assert "".join(screen(received)) == "one [red]line"  # the bar is gone at the end


TABLE = """
name = "[red]:smile: " + "long " * 20 + "name[/red]"
output.print_table(
    ["data set", "top-1 %", "n", "[x]"], [[name, "31.62", 374, None], ["b", "7.1", 12, "text"]], title="[b]Scores"
)
"""


def test_table_in_a_pipe_is_not_cut_and_numbers_are_right_aligned() -> None:
    name = "[red]:smile: " + "long " * 20 + "name[/red]"
    pad = " " * len(name)
    assert in_pipe(TABLE).stdout.splitlines() == [
        "[b]Scores",
        f"{'data set':{len(name)}}  top-1 %    n  [x]",
        f"{name}    31.62  374  -",
        f"b{pad[1:]}      7.1   12  text",
    ]


def test_table_in_a_pipe_has_no_escapes() -> None:
    assert "\x1b" not in in_pipe(TABLE, FORCE_COLOR="1").stdout


def test_table_on_a_terminal_folds_at_its_width() -> None:
    received, _ = on_terminal(TABLE)
    lines = screen(received)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "31.62 374" in text
    assert text.count("long") == 20
    assert "[/red]" in text


def test_words_fold_before_numbers_do() -> None:
    number = "1234567890" * 3
    rows = f"[['word ' * 40, '{number}', '{number}']]"
    received, _ = on_terminal(f"output.print_table(['text', 'a', 'b'], {rows})")
    assert received.count(number) == 2
    assert max(map(len, screen(received))) <= 80


def test_table_without_rows_shows_its_head() -> None:
    assert in_pipe("output.print_table(['a', 'b'], [])").stdout == "a  b\n"


def test_table_too_wide_for_any_terminal_keeps_its_numbers_whole() -> None:
    received, _ = on_terminal("output.print_table(['column'] * 12, [[1234567] * 12])", width=40)
    assert received.count("1234567") == 12


SCORES = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    + """
from pathlib import Path
from results_for_tests import recalls, sweep_result, zeroshot_result
from mlip_cli.evaluate.stored import EvaluatedCheckpoint, Measured
from mlip_cli.report.sweeps import print_sweep
from mlip_cli.report.scores import print_zeroshot
from mlip_cli.runs.folder import Run

checkpoints = [
    EvaluatedCheckpoint(label, Run(Path(label)), Path("step_0000240"), True, "")
    for label in ("openmoji-20261122-084311", "openmoji_clip-20261122-090117/step_0000120")
]
classes = [{"class": "c", "n": 1, "recall": 1.0}] * 383
names = {"per_class": classes, "names": recalls(1, 5), "pictures": recalls(1, 5)}
more = {"openmoji": {"names": recalls(1, 5)}, "imagenet1k-unverified": {"num_classes": 1000}}
sets = {"openmoji_combinations": names, **more}
print_zeroshot(
    {
        dataset: [
            Measured(own, zeroshot_result(dataset=dataset, rate=rate, features=own is checkpoints[0], **more))
            for own in checkpoints
            for rate in (0.0, 0.516)
        ]
        for dataset, more in sets.items()
    },
    failed=["shards:data/photographs/validation"],
)
print_sweep(sweep_result({None: (1.0, 1.0), "guided": (1.42, 1.62)}, tokens=[196] * 24))
"""
)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_results_fit_the_terminal_with_whole_rows(width: int) -> None:
    received, _ = on_terminal(SCORES, width=width)
    assert "\x1b" not in received.replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")
    lines = re.sub(r"\x1b\[\dm", "", received).splitlines()
    assert max(map(len, lines)) <= width
    piped = in_pipe(SCORES).stdout
    assert "\x1b" not in piped
    rows = [line.split() for line in piped.splitlines() if "34.4 (31.0-38.4)" in line]
    assert len(rows) == 8 + 8 + 8 + 8 + 8 + 8 + 2 + 4
    assert [line.split() for line in lines if "34.4 (31.0-38.4)" in line] == rows
    assert sorted("".join(piped.split())) == sorted("".join("".join(lines).split()))  # folded, and nothing is cut


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.print_json({"acc5": float("nan")})


@pytest.mark.parametrize(
    ("n", "words", "text"),
    [
        (0, ["row"], "0 rows"),
        (1, ["row"], "1 row"),
        (1234, ["row"], "1,234 rows"),
        (1, ["loader process", "loader processes"], "1 loader process"),
        (2, ["loader process", "loader processes"], "2 loader processes"),
    ],
)
def test_plural(n: int, words: list[str], text: str) -> None:
    assert output.plural(n, *words) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.0 KiB"),
        (512, "0.5 KiB"),
        (100_000, "97.7 KiB"),
        (2**20 // 10 + 1, "0.1 MiB"),
        (3 * 2**20, "3.0 MiB"),
        (2**30 // 10, "102.4 MiB"),
        (2**30 // 10 + 1, "0.10 GiB"),
        (2**40, "1024.00 GiB"),
    ],
)
def test_sizes_are_never_zero_of_a_large_unit(num_bytes: int, text: str) -> None:
    assert output.size_in_words(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--"), (0, "0:00"), (59.6, "1:00"), (130, "2:10"), (7325, "2:02:05")]
)
def test_clock(seconds: float | None, text: str) -> None:
    assert output.clock(seconds) == text
