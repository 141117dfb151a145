"""`mlip export`: a run's model in the layout of another program, checked by that program."""

import os
import shlex
from pathlib import Path

from mlip_cli.errors import RunError, UsageError, interrupted_as
from mlip_cli.files import full_disk_named, remove, remove_leftovers, sync_folder, temporary_path, write_text
from mlip_cli.paths import check_can_be_made
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.terminal.output import print_json, print_lines, say, warn


def export(run: str, out: Path, *, format: str, merge_rate: float | None, push: str | None, as_json: bool) -> None:
    """Write OUT, with a model card, and upload it if asked to. Nothing is left of an export that failed.

    Raises:
        UsageError: no such run; OUT exists; the format cannot hold the model, or its packages are not installed.
        RunError: the other program computes other features, or the upload failed; OUT then stays.
    """
    if format != "onnx" and merge_rate is not None:
        raise UsageError(f"--merge-rate {merge_rate:g}: only --format onnx holds merges; leave it out")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; name another folder")
    check_can_be_made(out, option="OUT")
    if format == "onnx":
        from mlip_cli.export.onnx import check_packages

        check_packages()
    if push is not None:
        from mlip_cli.export.push import check_push

        check_push(push)
    checkpoint = find_checkpoint(run)[1]
    with interrupted_as("interrupted; nothing was written"):
        say("loading PyTorch")
        from mlip_cli.export.card import model_card
        from mlip_cli.export.write import import_packages, write_format
        from mlip_cli.runs.loading import load_run

        import_packages(format)  # before there is something to clean up: Ctrl-C in an import ends the process
        loaded = load_run(str(checkpoint), device="cpu")
        remove_leftovers(out)
        temporary = temporary_path(out)
        temporary.mkdir(parents=True)
        try:
            with full_disk_named(out, "make room and repeat the command"):
                written = write_format(loaded, temporary, format=format, merge_rate=merge_rate)
                card = model_card(loaded.run, loaded.recipe, checkpoint, format=format, lost=written.lost)
                write_text(temporary / "README.md", card)
                mode = (temporary / "README.md").stat().st_mode
                for path in temporary.rglob("*"):
                    if path.is_file():
                        path.chmod(mode)  # safetensors hides its files from everybody else
                if out.is_dir():
                    out.rmdir()
                os.replace(temporary, out)
                sync_folder(out.absolute().parent)
        finally:
            remove(temporary)
    for line in written.lost:
        warn(f"--format {format} does not hold {line}")
    say(f"checked with {written.by}: features differ by {written.difference:.1e} at most")
    address = None
    if push is not None:
        from mlip_cli.export.push import push as upload

        try:
            address = upload(out, push)
        except RunError as error:
            again = shlex.join(["hf", "upload", push, str(out)])
            raise RunError(f"{error}\n{out} is written; upload it with: {again}") from None
        say(f"uploaded to {address}")
    if as_json:
        result = {"folder": str(out), "format": format, "largest_difference": written.difference}
        print_json({**result, "not_held": written.lost, "address": address})
    else:
        print_lines(str(out))
