"""What people see, on real terminals and through real pipes."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap

import pytest

from mlip_cli import drawing, output
from mlip_cli.config import LOSS_NAMES

START = "from mlip_cli import drawing, output\noutput.start_logging()\n"
TRAIN = """
with drawing.training_panel(240) as panel:
    for step in (10, 20, 240):
        panel.update(
            {"step": step, "loss": 4 - step / 100, "spatial_global": 3.1, "images_per_s": 812.4,
             "data_wait_share": 0.012, "peak_gib": 1.5, "lr": 1e-3},
            eta_s=None if step == 10 else 240 - step,
        )
        output.say(f"saved checkpoints/step_{step:07} [bold]after[/bold] {step} steps")
"""


FOUR_LOSSES = """
import os
losses = dict(zip(drawing.LOSS_KEYS, (4.912, 3.641, 0.523, 3.669, 0.376)))
rates = {"images_per_s": 1812.4, "data_wait_share": 0.012, "peak_gib": 1.5, "lr": 4.1667e-4}
counts = {"skipped_steps": 0, "bad_samples": 12}
with drawing.training_panel(240) as panel:
    panel.update({"step": 10, **losses, **rates, **counts}, eta_s=100)
    panel.doing("evaluating openmoji")
    panel.doing("evaluating openmoji", done=128, total=383)
    panel.measured(
        10, "openmoji", "mean recall 34.4 % (chance 11.1), top-1 41.0 %, name R@1 2.1 % (0.3), R@5 9.1 % (1.3); n 383"
    )
    panel.doing(None)
    os.write(2, b"^C")  # as a terminal does to the panel
    output.warn("SIGINT: stopping after this step and saving; Ctrl-C again leaves without saving, the words fold")
    panel.doing("saving the checkpoint of step 11")
    panel.move(11, eta_s=99)
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "RANK")}
    return kept | {"TERM": "xterm-256color"} | changes


def in_pipe(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with both streams in pipes."""
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def on_terminal(code: str, *, width: int = 80, stdout_in_pipe: bool = False, **changes: str) -> tuple[str, str]:
    """Run `code` on a pseudo-terminal of `width` columns: (all that the terminal received, stdout if in a pipe)."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        stdout = subprocess.PIPE if stdout_in_pipe else slave
        process = subprocess.Popen(
            [sys.executable, "-c", START + textwrap.dedent(code)],
            stdin=slave,
            stdout=stdout,
            stderr=slave,
            env=environment(**changes),
        )
        os.close(slave)
        received = b""
        while True:
            ready, _, _ = select.select([master], [], [], 60)
            assert ready, "the child says nothing more and does not end"
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not part:
                break
            received += part
        piped = process.stdout.read().decode() if process.stdout else ""
        assert process.wait(60) == 0, received.decode()
    finally:
        os.close(master)
    return received.decode(), piped


def screen(received: str, width: int = 80) -> list[str]:
    """What a terminal shows at the end: the few control sequences that Rich uses, applied."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", received, re.S):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token == "\x1b[2K":
                lines[row] = ""
        else:
            if column == width:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + token + line[column + 1 :], column + 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


def test_losses_on_the_panel_are_the_recipe_s() -> None:
    assert ("loss", *LOSS_NAMES) == drawing.LOSS_KEYS


def test_panel_in_a_pipe_is_one_plain_line_a_step() -> None:
    done = in_pipe(TRAIN)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "step 10/240  loss 3.900  spatial_global 3.100  812.4 images/s  data wait 1 %  memory 1.50 GiB  ETA -:--",
        "saved checkpoints/step_0000010 [bold]after[/bold] 10 steps",
        "step 20/240  loss 3.800  spatial_global 3.100  812.4 images/s  data wait 1 %  memory 1.50 GiB  ETA 3:40",
        "saved checkpoints/step_0000020 [bold]after[/bold] 20 steps",
        "step 240/240  loss 1.600  spatial_global 3.100  812.4 images/s  data wait 1 %  memory 1.50 GiB  ETA 0:00",
        "saved checkpoints/step_0000240 [bold]after[/bold] 240 steps",
    ]


def test_panel_stays_plain_in_a_pipe_where_colours_are_forced() -> None:
    assert in_pipe(TRAIN, FORCE_COLOR="1").stderr == in_pipe(TRAIN).stderr


def test_panel_on_a_terminal_is_redrawn_below_the_log() -> None:
    received, _ = on_terminal(TRAIN)
    shown = screen(received)
    assert shown[:3] == [f"saved checkpoints/step_{s:07} [bold]after[/bold] {s} steps" for s in (10, 20, 240)]
    assert re.fullmatch(r"step 240/240  ━+  ETA 0:00", shown[3])
    assert len(shown[3]) == 76
    assert shown[4:] == [
        "loss   spatial_global",
        "1.600  3.100",
        "images/s  data wait  memory    lr",
        "812.4     1 %        1.50 GiB  0.001",
        "",
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colours", [{}, {"NO_COLOR": "1"}])
def test_panel_with_all_there_is(width: int, colours: dict[str, str]) -> None:
    received, _ = on_terminal(FOUR_LOSSES, width=width, **colours)
    shown = screen(received, width)
    warning = "warning: SIGINT: stopping after this step and saving; Ctrl-C again leaves"
    words = "step 10: openmoji: mean recall 34.4 % (chance 11.1), top-1 41.0 %, name R@1"
    fold = "\n" if width == 80 else ""
    folded = f"{warning}{fold + '  ' if fold else ' '}without saving, the words fold"
    measured = f"{words}{fold or ' '}2.1 % (0.3), R@5 9.1 % (1.3); n 383"
    assert [re.sub("━[━╸╺ ]*", "━ ", line) for line in shown if "━" in line] == ["step 11/240  ━ ETA 1:39"]
    assert [line for line in shown if "━" not in line] == [
        *folded.splitlines(),
        "loss   spatial_global  spatial_token  frequency_global  frequency_token",
        "4.912  3.641           0.523          3.669             0.376",
        "images/s  data wait  memory    lr        skipped steps  bad samples",
        "1,812     1 %        1.50 GiB  0.000417  0              12",
        *measured.splitlines(),
        "",
    ]


def test_panel_wraps_by_whole_cells() -> None:
    shown = screen(on_terminal(FOUR_LOSSES, width=40)[0], 40)
    assert max(map(len, shown)) <= 40
    start = shown.index("loss   spatial_global  spatial_token")
    assert shown[start : start + 8] == [
        *("loss   spatial_global  spatial_token", "4.912  3.641           0.523"),
        *("frequency_global  frequency_token", "3.669             0.376"),
        *("images/s  data wait  memory", "1,812     1 %        1.50 GiB"),
        *("lr        skipped steps  bad samples", "0.000417  0              12"),
    ]


def test_panel_says_what_it_does_instead_of_steps() -> None:
    received, _ = on_terminal(FOUR_LOSSES)
    for activity in ("waiting for the first batch", "evaluating openmoji", "openmoji: 128 of 383", "saving the"):
        assert activity in received


def test_everything_in_a_pipe_is_a_complete_line_without_control_characters() -> None:
    done = in_pipe(FOUR_LOSSES.replace('os.write(2, b"^C")', "pass"), FORCE_COLOR="1")
    assert done.stderr.splitlines() == [
        "step 10/240  loss 4.912  spatial_global 3.641  spatial_token 0.523  frequency_global 3.669  "
        "frequency_token 0.376  1,812 images/s  data wait 1 %  memory 1.50 GiB  bad samples 12  ETA 1:40",
        "step 10: openmoji: mean recall 34.4 % (chance 11.1), top-1 41.0 %, name R@1 2.1 % (0.3), R@5 9.1 % (1.3); "
        "n 383",
        "warning: SIGINT: stopping after this step and saving; Ctrl-C again leaves without saving, the words fold",
    ]


def test_long_work_in_a_pipe_says_now_and_then_how_far_it_is() -> None:
    code = """
    drawing.LINE_EVERY_S = 0
    with output.progress(3000, "reading [x]") as bar:
        bar.advance(0, 1500)
    with drawing.training_panel(240) as panel:
        panel.doing("evaluating digits")
        panel.doing("evaluating digits", done=128, total=1797)
    """
    lines = in_pipe(code).stderr.splitlines()
    assert re.fullmatch(r"reading \[x\]: 1,500 of 3,000, (-:--|0:0\d) left", lines[0])
    assert lines[1:] == ["step 0: evaluating digits: 128 of 1,797"]
    assert in_pipe(code.replace("drawing.LINE_EVERY_S = 0", "")).stderr == ""


def test_a_command_to_copy_is_not_folded() -> None:
    command = "mlip pretrain recipes/openmoji.yaml " + " ".join(f"data.key_{i}=value" for i in range(9))
    received, _ = on_terminal(f"output.say({command!r})\noutput.say_to_copy({command!r})")
    assert received.count(command) == 1
    assert max(map(len, received.splitlines()[:-1])) <= 80


def test_only_colours_that_show_on_white_and_on_black() -> None:
    received = on_terminal(FOUR_LOSSES)[0] + on_terminal("with output.progress(3, 'x') as bar:\n    bar.advance(0)")[0]
    codes = {code for codes in re.findall(r"\x1b\[([\d;]*)m", received) for code in codes.split(";")}
    assert codes <= {"", "0", "1", "2", "31", "32", "36"}  # bold, dim, red, green, cyan


@pytest.mark.parametrize("width", [40, 120])
def test_panel_survives_lines_wider_than_the_terminal(width: int) -> None:
    code = TRAIN.replace("saved", "saved " + "x" * 90 + " ")
    text = "\n".join(screen(on_terminal(code, width=width)[0], width))
    assert text.count("ETA") == 1
    assert text.replace("\n", "").count("x" * 90) == 3


def test_results_stay_on_stdout_while_a_panel_is_drawn() -> None:
    code = TRAIN + "    output.print_json({'step': 240})\n"
    received, piped = on_terminal(code, stdout_in_pipe=True)
    assert json.loads(piped) == {"step": 240}
    assert '"step"' not in received


def test_an_error_leaves_the_terminal_usable() -> None:
    code = """
    try:
        with drawing.training_panel(2) as panel:
            panel.update({"step": 1, "loss": 1.0}, eta_s=None)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        output.say("interrupted")
    """
    received, _ = on_terminal(code)
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
    assert screen(received)[3] == "interrupted"


def test_plain_lines_reach_other_handlers_from_a_terminal_too() -> None:
    code = "import logging, io\nheard = io.StringIO()\noutput.logger.addHandler(logging.StreamHandler(heard))\n"
    _, piped = on_terminal(code + TRAIN + "output.print_lines(heard.getvalue())", stdout_in_pipe=True)
    assert [line.split("  ")[0] for line in piped.splitlines()[::2]] == ["step 10/240", "step 20/240", "step 240/240"]


def test_progress_is_drawn_on_a_terminal_only() -> None:
    code = """
    with output.progress(3, "reading [bold]x[/bold]") as bar:
        bar.advance(0)
        output.say("one [red]line")
        bar.refresh()
    """
    assert in_pipe(code).stderr == "one [red]line\n"
    assert in_pipe(code, FORCE_COLOR="1").stderr == "one [red]line\n"
    received, _ = on_terminal(code)
    assert "reading [bold]x[/bold]" in received
    assert "".join(screen(received)) == "one [red]line"  # the bar is gone at the end


def test_progress_is_silent_under_a_panel() -> None:
    code = TRAIN + "    with output.progress(3, 'evaluating') as bar:\n        bar.advance(0)\n"
    assert "evaluating" not in on_terminal(code)[0]


def test_other_ranks_are_silent() -> None:
    done = in_pipe(TRAIN + "output.print_table(['a'], [[1]])\noutput.print_json(1)\noutput.warn('x')", RANK="1")
    assert done.stdout + done.stderr == ""


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


SCORES = """
from mlip_cli.commands import sweep_tables, zeroshot_tables

def scores(*names):
    return {key: value for name in names for key, value in ((name, 0.3437), (f"{name}_interval", (0.3101, 0.3838)))}

def result(run, rate, dataset, **more):
    return {
        "run": run, "step": 240, "is_last_checkpoint": True, "dataset": dataset, "true_merge_rate": rate, "n": 50_000,
        "num_classes": 1000, "chance": 0.001, "acc5": 0.61234, "images_per_s": 12345.6, "measured_at": rate,
        **scores("acc1", "mean_per_class_recall"), **more,
    }

names = scores("r1", "r5") | {"r1_chance": 0.003, "r5_chance": 0.0131, "num_candidates": 383}
runs = ("openmoji-20261122-084311", "openmoji_clip-20261122-090117/step_0000120")
zeroshot_tables.print_results(
    [
        [result(run, rate, "openmoji", names=names) for run in runs for rate in (0.0, 0.516)],
        [result(run, rate, "imagenet1k-unverified") for run in runs for rate in (0.0, 0.516)],
    ],
    failed=["shards:data/photographs/validation"],
)
test = {"won": 1234, "lost": 1187, "p": 0.0000123}
ways = {way: {f"r{k}_chance": 0.0131 for k in (1, 5, 10)} | scores("r1", "r5", "r10") for way in (
    "image_to_text", "text_to_image")}
points = [
    {"method": method, "rate": rate, "true_rate": 0.516, "gflops": 17.58, "images_per_s": 12345.6, "speedup": 1.52,
     "speedup_interval": (1.42, 1.62), "expected_speedup": 1.47, "tokens_per_block": [196] * 24, "agreement": 0.98,
     "names": names, "paired": dict.fromkeys(("acc1", "image_to_text_r5", "text_to_image_r5"), test), **ways,
     **scores("acc1", "mean_per_class_recall")}
    for method, rate in ((None, 0), ("guided", 0.25))
]
sets = [{"dataset": "openmoji", "task": "zeroshot", "n": 383, "chance": 0.111, "points": points},
        {"dataset": "validation", "task": "retrieval", "n": 383, "num_texts": 2312, "points": points}]
sweep_tables.show({"points": points, "batch_size": 64, "device": "cuda", "device_name": "NVIDIA H200", "threads": 8,
                   "torch": "2.15.0+cu132", "datasets": sets, "failed": []})
"""


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_results_fit_the_terminal_with_whole_rows(width: int) -> None:
    received, _ = on_terminal(SCORES, width=width)
    assert "\x1b" not in received.replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")
    lines = re.sub(r"\x1b\[\dm", "", received).splitlines()
    assert max(map(len, lines)) <= width
    piped = in_pipe(SCORES).stdout
    assert "\x1b" not in piped
    rows = [line.split() for line in piped.splitlines() if "34.4 (31.0-38.4)" in line]
    assert len(rows) == 4 + 4 + 2 + 4
    assert [line.split() for line in lines if "34.4 (31.0-38.4)" in line] == rows
    assert sorted("".join(piped.split())) == sorted("".join("".join(lines).split()))  # folded, and nothing is cut


def test_no_color_is_honoured() -> None:
    colours = re.compile(r"\x1b\[[0-9;]*[34][0-7]?m|38;5")
    assert colours.search(on_terminal(TRAIN)[0])
    assert not colours.search(on_terminal(TRAIN, NO_COLOR="1")[0])
    assert "\x1b" not in in_pipe(TABLE).stdout


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
    ("seconds", "text"), [(None, "-:--"), (0, "0:00"), (59.6, "1:00"), (130, "2:10"), (7325, "2:02:05")]
)
def test_clock(seconds: float | None, text: str) -> None:
    assert output.clock(seconds) == text
