"""The training panel, on real terminals and through real pipes."""

import json
import re
import time

import pytest
from terminals_for_tests import in_pipe, on_terminal, screen

from mlip_cli.terminal.history import BLOCKS, MOST_POINTS, History
from mlip_cli.terminal.panel import TrainingPanel

TRAIN = """
with drawing.training_panel(240) as panel:
    for step in (10, 20, 240):
        panel.update(
            {"step": step, "loss": 4 - step / 100, "spatial_global": 3.1, "images_per_s": 812.4,
             "data_wait_share": 0.012, "peak_gib": 1.5, "lr": 1e-3}
        )
        output.say(f"saved checkpoints/step_{step:07} [bold]after[/bold] {step} steps")
"""


FOUR_LOSSES = """
import os
losses = {
    "loss": 4.912, "spatial_global": 3.641, "spatial_token": 0.523, "frequency_global": 3.669, "frequency_token": 0.376
}
rates = {"images_per_s": 1812.4, "data_wait_share": 0.012, "peak_gib": 1.5, "lr": 4.1667e-4}
counts = {"skipped_steps": 0, "bad_samples": 12}
with drawing.training_panel(240) as panel:
    panel.update({"step": 10, **losses, **rates, **counts})
    panel.doing("evaluating openmoji")
    panel.doing("evaluating openmoji", done=128, total=383)
    panel.measured(
        10, "openmoji", "mean recall 34.4 % (chance 11.1), top-1 41.0 %, name R@1 2.1 % (0.3), R@5 9.1 % (1.3); n 383"
    )
    panel.doing(None)
    os.write(2, b"^C")  # as a terminal does to the panel
    output.warn("SIGINT: stopping after this step and saving; Ctrl-C again leaves without saving, the words fold")
    panel.doing("saving the checkpoint of step 11")
    panel.step_done(11)
"""


def at_once(lines: str) -> str:
    """Lines without the seconds that a busy machine takes."""
    return re.sub(r"0:\d\d", "0:00", lines)


def test_panel_in_a_pipe_is_one_plain_line_a_step() -> None:
    done = in_pipe(TRAIN)
    assert done.stdout == ""
    assert at_once(done.stderr).splitlines() == [
        "step 10/240  loss 3.900  spatial_global 3.100  812.4 images/s  data wait 1 %  memory 1.50 GiB  ETA -:--",
        "saved checkpoints/step_0000010 [bold]after[/bold] 10 steps",
        "step 20/240  loss 3.800  spatial_global 3.100  812.4 images/s  data wait 1 %  memory 1.50 GiB  ETA 0:00",
        "saved checkpoints/step_0000020 [bold]after[/bold] 20 steps",
        "step 240/240  loss 1.600  spatial_global 3.100  812.4 images/s  data wait 1 %  memory 1.50 GiB  ETA 0:00",
        "saved checkpoints/step_0000240 [bold]after[/bold] 240 steps",
    ]


def test_panel_stays_plain_in_a_pipe_where_colours_are_forced() -> None:
    assert at_once(in_pipe(TRAIN, FORCE_COLOR="1").stderr) == at_once(in_pipe(TRAIN).stderr)


def test_panel_on_a_terminal_is_redrawn_below_the_log() -> None:
    received, _ = on_terminal(TRAIN)
    shown = [at_once(line) for line in screen(received)]
    assert shown[:3] == [f"saved checkpoints/step_{s:07} [bold]after[/bold] {s} steps" for s in (10, 20, 240)]
    assert re.fullmatch(r"step 240/240  ━+  0:00 elapsed  ETA 0:00", shown[3])
    assert len(shown[3]) == 76
    assert shown[4:] == [
        "loss       spatial_global",
        "1.600 ██▁  3.100 ▁▁▁",
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
    top = [re.sub(r"━[━╸╺ ]*|\d+:\d+", "━ ", line) for line in shown if "━" in line]
    assert top == ["step 11/240  ━ ━  elapsed  ETA ━ "]
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
    start = next(number for number, line in enumerate(shown) if line.startswith("loss "))
    assert [line.split() for line in shown[start : start + 10]] == [
        *(["loss", "spatial_global"], ["4.912", "3.641"], ["spatial_token", "frequency_global"], ["0.523", "3.669"]),
        *(["frequency_token"], ["0.376"], ["images/s", "data", "wait", "memory"], ["1,812", "1", "%", "1.50", "GiB"]),
        *(["lr", "skipped", "steps", "bad", "samples"], ["0.000417", "0", "12"]),
    ]


EPOCHS = """
from mlip_cli.terminal.history import Headline
with drawing.training_panel(240, line_every=10, steps_per_epoch=11) as panel:
    panel.recall({"step": 20, "samples_seen": 2560, "loss": 5.0, "spatial_global": None})
    panel.recall({"step": 20, "samples_seen": 2560, "pets_acc1": 0.31})
    panel.glance({"step": 21, "loss": 4.0})
    panel.step_done(21)
    for step, score in ((30, 0.2), (40, 0.25), (50, 0.3), (60, 0.26), (70, 0.27), (80, 0.28)):
        panel.update({"step": step, "loss": 4.0 - step / 40})
        pets = Headline("pets_acc1", "pets acc1", score, 0.1)
        panel.measured(step, "pets", f"top-1 {100 * score:.1f} %", headline=pets)
        panel.measured(step, "birds", "top-1 5.0 %", headline=Headline("birds_acc1", "birds acc1", 0.05))
"""


@pytest.mark.parametrize(("width", "steps"), [(80, 5), (120, 7)])
def test_panel_shows_the_course_of_losses_and_scores(width: int, steps: int) -> None:
    shown = [" ".join(line.split()) for line in screen(on_terminal(EPOCHS, width=width)[0], width)]
    assert re.fullmatch(r"step 80/240 ━[━╸╺ ]* epoch 7\.3/21\.8 0:0\d elapsed ETA 0:\d\d", shown[0])
    assert shown[1:3] == ["loss", "2.000 █▅▄▄▃▂▂▁"], "from the earlier session's line on"
    first, *later = [20, 30, 40, 50, 60, 70, 80][-steps:]
    scores = ["31.0", "20.0", "25.0", "30.0", "26.0", "27.0", "28.0"][-steps:]
    assert shown[3] == f"evaluation, % chance step {first} {' '.join(map(str, later))} best"
    assert shown[4] == f"pets acc1 10.0 {' '.join(scores)} 31.0 at 20"
    assert shown[5] == f"birds acc1 {' '.join(['5.0'] * min(steps, 6))} 5.0 at 30"
    assert shown[6:8] == ["step 80: pets: top-1 28.0 %", "step 80: birds: top-1 5.0 %"]


def test_the_first_step_shows_its_losses_at_once_and_only_on_a_terminal() -> None:
    code = """
    with drawing.training_panel(200, line_every=10) as panel:
        panel.glance({"step": 1, "loss": 4.852, "images_per_s": 21.5})
        panel.step_done(1)
    """
    received = on_terminal(code.replace("panel.step_done(1)", "import os; os._exit(0)"))[0]
    shown = screen(received)
    assert shown[0].startswith("step 1/200 "), "the losses come with their step"
    assert shown[1:3] == ["loss", "4.852"]
    assert in_pipe(code).stderr.startswith("step 1/200: first step after 0.")
    assert "4.852" not in in_pipe(code).stderr


def test_a_terminal_without_block_characters_gets_no_curves() -> None:
    code = TRAIN.replace(
        "with drawing", "import sys\nsys.stderr.reconfigure(encoding='ascii', errors='replace')\nwith drawing", 1
    )
    shown = screen(on_terminal(code)[0])
    assert "1.600  3.100" in shown
    assert not any("?" in line for line in shown[4:6])


def test_a_spark_is_made_of_the_means_of_equal_parts_of_the_steps() -> None:
    history = History()
    assert history.spark(8) == ""
    for step in range(4 * MOST_POINTS + 1):
        history.add(step, float(step))
    assert history.points == [(step + 7, step + 3.5) for step in range(0, 4 * MOST_POINTS, 8)], "means of 8 steps each"
    assert history.spark(8) == BLOCKS
    rare = History([(0, 1.0), (90, 0.0), (95, 0.0), (100, 0.0)])
    assert rare.spark(4) == "███▁", "a part without a value repeats the one before"


def test_panel_says_what_it_does_instead_of_steps() -> None:
    received, _ = on_terminal(FOUR_LOSSES)
    for activity in ("waiting for the first batch", "evaluating openmoji", "openmoji: 128 of 383", "saving the"):
        assert activity in received


def test_everything_in_a_pipe_is_a_complete_line_without_control_characters() -> None:
    done = in_pipe(FOUR_LOSSES.replace('os.write(2, b"^C")', "pass"), FORCE_COLOR="1")
    assert done.stderr.splitlines() == [
        "step 10/240  loss 4.912  spatial_global 3.641  spatial_token 0.523  frequency_global 3.669  "
        "frequency_token 0.376  1,812 images/s  data wait 1 %  memory 1.50 GiB  bad samples 12  ETA -:--",
        "step 10: openmoji: mean recall 34.4 % (chance 11.1), top-1 41.0 %, name R@1 2.1 % (0.3), R@5 9.1 % (1.3); "
        "n 383",
        "warning: SIGINT: stopping after this step and saving; Ctrl-C again leaves without saving, the words fold",
    ]


def test_long_work_in_a_pipe_says_now_and_then_how_far_it_is() -> None:
    code = """
    drawing.LINE_EVERY_S = 0
    with drawing.progress(3000, "reading [x]") as bar:
        bar.advance(0, 1500)
        bar.update(0, completed=2000, total=3001)
    with drawing.training_panel(240) as panel:
        panel.doing("evaluating digits")
        panel.doing("evaluating digits", done=128, total=1797)
    """
    lines = in_pipe(code).stderr.splitlines()
    assert re.fullmatch(r"reading \[x\]: 1,500 of 3,000, (-:--|0:0\d) left", lines[0])
    assert re.fullmatch(r"reading \[x\]: 2,000 of 3,001, (-:--|0:0\d) left", lines[1])
    assert lines[2:] == ["step 0: evaluating digits: 128 of 1,797"]
    assert in_pipe(code.replace("drawing.LINE_EVERY_S = 0", "")).stderr == ""


def test_the_first_step_in_a_pipe_is_a_sign_of_life() -> None:
    code = """
    with drawing.training_panel(200, line_every=10) as panel:
        for step in (5, 6):
            panel.step_done(step)
    """
    assert re.fullmatch(r"step 5/200: first step after 0\.\d s; a line every 10 steps\n", in_pipe(code).stderr)
    assert "first step" not in on_terminal(code)[0]
    logged = code.replace("panel.step_done(", 'panel.update({"step": 5}); panel.step_done(')
    assert "first step" not in in_pipe(logged).stderr


def test_the_time_left_is_the_mean_of_the_session_without_its_first_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = TrainingPanel(100, is_live=False)
    with caplog.at_level("INFO", logger="mlip_cli"):
        for step, now in ((20, 1300.0), (24, 1306.0), (25, 1310.0)):  # noqa: B007  # the clock reads it
            shown.update({"step": step})
    assert [line.rsplit(maxsplit=1)[1] for line in caplog.messages] == ["-:--", "1:54", "2:30"]


def test_only_colours_that_show_on_white_and_on_black() -> None:
    received = on_terminal(FOUR_LOSSES)[0] + on_terminal("with drawing.progress(3, 'x') as bar:\n    bar.advance(0)")[0]
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
            panel.update({"step": 1, "loss": 1.0})
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


def test_other_ranks_are_silent() -> None:
    done = in_pipe(TRAIN + "output.print_table(['a'], [[1]])\noutput.print_json(1)\noutput.warn('x')", RANK="1")
    assert done.stdout + done.stderr == ""


def test_no_color_is_honoured() -> None:
    colours = re.compile(r"\x1b\[[0-9;]*[34][0-7]?m|38;5")
    assert colours.search(on_terminal(TRAIN)[0])
    assert not colours.search(on_terminal(TRAIN, NO_COLOR="1")[0])
