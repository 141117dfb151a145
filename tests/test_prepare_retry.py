"""--retry-failed: the bytes of a run without failures, only failed rows are asked for, and kill -9 at any step."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from download_server_for_tests import DownloadServer
from runs_of_prepare_for_tests import counted, killed_at, run
from sources_for_tests import contents, picture, rejects, samples, write_files

from mlip_cli.data.prepare.check import check
from mlip_cli.data.prepare.part_tables import tables_of
from mlip_cli.data.prepare.shards import PART_ROW, sample_ends
from mlip_cli.data.prepare.workspace import PartResult
from mlip_cli.data.sources.records import Record, parts_of, parts_of_some

OUT = "the_out"
"""Named so that no other path holds the name."""
WORDS = ("in/list.tsv", OUT, "--image-column", "path", "--caption-column", "text", "--workers", "1")
LOCAL = (*WORDS, "--dedupe", "pixels", "--min-words", "3", "--holdout", "0.2")
LATER = (0, 3, 7, 12, 20, 27)
"""Rows whose pictures appear later."""
SAME = {9: 3, 14: 2, 15: 2, 21: 9, 27: 5}
"""Row -> an earlier one whose pixels it has, in a file of its own. Of 9 and 21 the first one appears later."""
NEVER, BROKEN = 17, 18


def write_source(folder: Path) -> Path:
    """A table of 30 pictures: row 25 names that of row 24, and a caption of row 25 is too short."""
    files: dict[str, bytes | str] = {}
    for i in range(30):
        content = picture(SAME.get(SAME.get(i, i), SAME.get(i, i)))
        files[f"{i:02d}.png"] = content + bytes(i) if i != BROKEN else b"no picture"
    del files[f"{NEVER}.png"], files["25.png"]
    names = [f"{24 if i == 25 else i:02d}.png" for i in range(30)]
    rows = "".join(f"{name}\t{'short' if i in (25, 12) else f'picture of thing {i}'}\n" for i, name in enumerate(names))
    write_files(folder, {**files, "list.tsv": f"path\ttext\n{rows}"})
    os.utime(folder / "list.tsv", (1, 1))
    return folder


def hide(folder: Path, rows: tuple[int, ...]) -> None:
    for row in rows:
        os.replace(folder / "in" / f"{row:02d}.png", folder / f"{row:02d}.png")


def show(folder: Path, rows: tuple[int, ...]) -> None:
    for row in rows:
        os.replace(folder / f"{row:02d}.png", folder / "in" / f"{row:02d}.png")


def whole(out: Path) -> dict[str, object]:
    """All files of a finished folder, and its summary but for the seconds."""
    summary = (out / "prepared.json").read_text()
    return {**contents(out), "summary": list((json.loads(summary) | {"seconds": 0}).items())}


def clean_run(folder: Path, words: tuple[str, ...] = LOCAL) -> dict[str, object]:
    """What a run gives in which no row fails that need not fail."""
    code, said = run(folder, *words)
    assert code == 0, said
    found = whole(folder / OUT)
    shutil.rmtree(folder / OUT)
    return found


def test_the_result_is_that_of_a_run_without_failures(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    expected = clean_run(tmp_path)
    hide(tmp_path, LATER)
    code, said = run(tmp_path, *LOCAL)
    assert code == 0, said
    assert "7 of them may succeed later: the same command with --retry-failed" in said
    before = whole(tmp_path / OUT)
    assert before != expected
    dropped = {row for _, row, reason, _ in rejects(tmp_path / OUT) if "duplicate" in reason}
    assert dropped == {14, 15, 21}  # 9 and 27 follow
    show(tmp_path, LATER[:2])
    for rows in (LATER[2:], ()):  # the second call gets the rest
        code, said = run(tmp_path, *LOCAL, "--retry-failed")
        assert code == 0, said
        assert not (tmp_path / OUT / ".prepare").exists()
        assert not check(tmp_path / OUT, num_workers=1).problems
        assert (whole(tmp_path / OUT) == expected) is not bool(rows)
        show(tmp_path, rows)
    twins = {row: detail for _, row, reason, detail in rejects(tmp_path / OUT) if "duplicate" in reason}
    assert twins == {9: "as list.tsv row 3", 14: "as list.tsv row 2", 15: "as list.tsv row 2"} | {
        21: "as list.tsv row 3",
        27: "as list.tsv row 5",
    }


@pytest.mark.slow
def test_kill_9_at_any_step_of_a_retry(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    expected = clean_run(tmp_path)
    hide(tmp_path, LATER)
    assert run(tmp_path, *LOCAL)[0] == 0
    before = whole(tmp_path / OUT)
    shutil.copytree(tmp_path / OUT, tmp_path / "kept")
    show(tmp_path, LATER)
    note = tmp_path / "note"
    assert run(tmp_path, *LOCAL, "--retry-failed", prelude=counted(OUT, note))[0] == 0
    num_steps = int(note.read_text())
    assert num_steps > 100
    assert whole(tmp_path / OUT) == expected
    went_on = 0
    for step in range(1, num_steps + 1, int(os.environ.get("RETRY_STRIDE", 37))):
        shutil.rmtree(tmp_path / OUT)
        shutil.copytree(tmp_path / "kept", tmp_path / OUT)
        run(tmp_path, *LOCAL, "--retry-failed", prelude=killed_at(OUT, step))
        if step % 2:
            code, said = run(tmp_path, *LOCAL)
            assert code == 0, (step, said)
            assert whole(tmp_path / OUT) in (before, expected), step
            assert not (tmp_path / OUT / ".prepare").exists()
            went_on += whole(tmp_path / OUT) == expected
        code, said = run(tmp_path, *LOCAL, "--retry-failed")
        assert code == 0, (step, said)
        assert whole(tmp_path / OUT) == expected, step
        assert not (tmp_path / OUT / ".prepare").exists(), step
    assert went_on


def test_an_unfinished_run_is_finished_and_then_tried_again(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    expected = clean_run(tmp_path)
    hide(tmp_path, LATER)
    step = 0
    while not (tmp_path / OUT / ".prepare/parts/part-000001.json").is_file():
        step += 40
        run(tmp_path, *LOCAL, prelude=killed_at(OUT, step))
    assert not (tmp_path / OUT / "prepared.json").exists()
    show(tmp_path, LATER)
    code, said = run(tmp_path, *LOCAL, "--retry-failed")
    assert code == 0, said
    assert whole(tmp_path / OUT) == expected


def test_only_failed_urls_are_asked_for(tmp_path: Path, server: DownloadServer) -> None:
    kinds = ("good", "busy_once", "nothing", "busy", "good", "closed", "html")
    urls = [server.url(f"{kinds[i % 7]}/{i}") for i in range(28)]
    rows = "".join(f"{url}\tpicture of thing {i}\n" for i, url in enumerate(urls))
    write_files(tmp_path / "in", {"list.tsv": f"path\ttext\n{rows}"})
    words = (*WORDS, "--holdout", "0", "--allow-private", "--retries", "0")
    code, said = run(tmp_path, *words)
    assert code == 0, said
    assert len(samples(tmp_path / OUT)) == 8
    first = server.asked.copy()
    code, said = run(tmp_path, *words, "--retry-failed")
    assert code == 0, said
    assert "12 pictures to download" in said
    found = whole(tmp_path / OUT)
    asked = {path.split("/")[1] for path, n in server.asked.items() if n > first[path]}
    assert asked == {"busy_once", "busy", "closed"}
    assert len(samples(tmp_path / OUT)) == 12
    shutil.rmtree(tmp_path / OUT)
    assert clean_run(tmp_path, words) == found


def test_what_is_refused_and_what_there_is_nothing_to_do_for(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    (tmp_path / "in" / f"{NEVER}.png").write_bytes(picture(NEVER))
    code, said = run(tmp_path, *LOCAL, "--retry-failed")
    assert (code, said.splitlines()[-1]) == (2, f"error: {OUT}: nothing was prepared here; leave out --retry-failed")
    code, said = run(tmp_path, *LOCAL, "--retry-failed", "--part", "1/2")
    assert (code, said.splitlines()[-1]) == (2, "error: --retry-failed: not with --part; one machine does all of it")
    assert run(tmp_path, *LOCAL)[0] == 0
    assert not (tmp_path / OUT / "retry.npz").exists()
    before = whole(tmp_path / OUT)
    code, said = run(tmp_path, *LOCAL, "--retry-failed")
    assert (code, said.splitlines()[0]) == (0, f"{OUT}: no reject of it can pass with time; nothing to try again")
    code, said = run(tmp_path, *LOCAL, "--retry-failed", "--size", "64")
    assert code == 2
    assert "was prepared from another source or with other options (size 256, now 64)" in said
    assert whole(tmp_path / OUT) == before


def test_a_picture_of_several_rows_that_appears_is_refused_before_anything_changes(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    os.replace(tmp_path / "in" / "24.png", tmp_path / "24.png")  # rows 24 and 25 name it
    assert run(tmp_path, *LOCAL)[0] == 0
    before = whole(tmp_path / OUT)
    show(tmp_path, (24,))
    code, said = run(tmp_path, *LOCAL, "--retry-failed")
    assert (code, said.splitlines()[-1]) == (
        2,
        f"error: {OUT}: its failed rows cannot be tried again (several rows name a picture that has appeared or gone "
        "since, so rows are counted anew); remove it and prepare it again",
    )
    assert whole(tmp_path / OUT) == before
    assert not (tmp_path / OUT / ".prepare").exists()


def test_damaged_output_is_refused_before_anything_changes(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    assert run(tmp_path, *LOCAL)[0] == 0
    shard = next((tmp_path / OUT / "train").glob("*.tar"))
    whole_shard = shard.read_bytes()
    shard.write_bytes(whole_shard[:-512])
    code, said = run(tmp_path, *LOCAL, "--retry-failed")
    assert code == 1
    assert "the shard was cut or changed" in said
    shard.write_bytes(whole_shard)
    (tmp_path / OUT / "retry.npz").unlink()
    code, said = run(tmp_path, *LOCAL, "--retry-failed")
    assert code == 2
    assert f"error: {OUT}: its failed rows cannot be tried again" in said.splitlines()[-1]
    assert (tmp_path / OUT / "prepared.json").is_file()


def test_while_a_retry_is_unfinished_shares_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    expected = clean_run(tmp_path)
    hide(tmp_path, LATER)
    assert run(tmp_path, *LOCAL)[0] == 0
    show(tmp_path, LATER)
    step = 0
    while (tmp_path / OUT / "prepared.json").exists():
        step += 40
        run(tmp_path, *LOCAL, "--retry-failed", prelude=killed_at(OUT, step))
    for words in (("--part", "1/2"), ("--finish",)):
        code, said = run(tmp_path, *LOCAL, *words)
        assert code == 2
        assert said.splitlines()[-1] == (
            f"error: {OUT}: --retry-failed has begun here; run it again without --part and --finish"
        )
    assert run(tmp_path, *LOCAL)[0] == 0
    assert whole(tmp_path / OUT) == expected


def test_a_url_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "in")
    for words in ((), ("--workspace", "made")):
        code, said = run(tmp_path, WORDS[0], "memory://bucket/x", *WORDS[2:], "--retry-failed", *words)
        why = "not for an OUT at a URL; the data of memory://bucket/x are no longer here; leave it out"
        assert (code, said.splitlines()[-1]) == (2, f"error: --retry-failed: {why}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("is_between", [False, True])
def test_tables_of_parts_are_in_the_order_of_the_source(tmp_path: Path, is_between: bool) -> None:
    draw = np.random.default_rng(0)
    table = np.frombuffer(draw.bytes(200 * PART_ROW.itemsize), PART_ROW).copy()
    table["row"] = np.sort(draw.choice(1_000, 200, replace=False))
    table["record"]["offset"] = 512 * np.arange(200)
    parts = draw.choice([0, 1, 2, 4, 5], 200)  # part 3 is empty
    parts = parts if is_between else np.sort(parts)[::-1]
    tars = [tmp_path / f"part-{number:06d}.tar" for number in range(6)]
    for number, tar in enumerate(tars):
        np.save(tar.with_suffix(".npy"), table[parts == number])
    results = [PartResult(number, int((parts == number).sum()), tar.name, {}) for number, tar in enumerate(tars)]
    tables = tables_of(tmp_path, results)
    assert (tables.order is not None) == is_between
    assert all((tables[name] == table[name]).all() for name in PART_ROW.names or ())
    assert (tables.splits == table["split"]).all()
    assert (
        512 * tables.blocks.astype(int) == sample_ends(table["record"]) - table["record"]["offset"].astype(int)
    ).all()
    rows = np.sort(draw.choice(200, 50, replace=False))
    assert [tables.tars[part] for part in tables.parts(rows).tolist()] == [tars[part] for part in parts[rows]]
    assert (tables.records(rows) == table["record"][rows]).all()
    for row in rows.tolist():
        tar, record = tables.place(row)
        assert (tar, record) == (tars[parts[row]], table["record"][row])


def test_parts_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlip_cli.data.sources.records.PART_ROWS", 3)
    rows = [Record("list.tsv", i, None, ()) for i in range(20)]
    parts = list(parts_of_some(iter(rows), [0, 4, 5, 11, 19], first_number=7))
    assert [part.number for part in parts] == [7, 8]
    assert [[part.place(i) for i in range(len(part.records))] for part in parts] == [[0, 4, 5], [11, 19]]
    assert [[record.row for record in part.records] for part in parts] == [[0, 4, 5], [11, 19]]
    assert [part.place(2) for part in parts_of(rows) if len(part.records) == 3] == [2, 5, 8, 11, 14, 17]
