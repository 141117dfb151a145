"""Find the checkpoint that a RUN on the command line, or `model.init`, names."""

import shlex
from pathlib import Path

from mlip_cli.errors import UsageError
from mlip_cli.runs.folder import CHECKPOINT_NAME, Run, newest_in_words, newest_run
from mlip_cli.runs.foreign import find_foreign


def find_checkpoint(target: str | None) -> tuple[Run, Path]:
    """The run and the checkpoint that `target` names: a run folder, a checkpoint folder, or None for the newest run.

    Weights of another program (see `find_foreign`) become a run first, which loads torch.

    Raises:
        UsageError: there is no such run, checkpoint or file, or mlip cannot read it.
    """
    foreign = None if target is None else find_foreign(target)
    if foreign is not None:
        from mlip_cli.runs.importing import imported

        return imported(foreign)
    if target is None:
        run = newest_run()
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        return run, checkpoint
    path = Path(target)
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint; {newest_in_words()}")
    if (path / "recipe.yaml").is_file():
        run = Run(path)
        newest = run.latest_checkpoint()
        if newest is None:
            go_on = shlex.join(["mlip", "pretrain", str(run.recipe), "--out", str(path), "--resume"])
            raise UsageError(f"{path}: it holds no complete checkpoint; continue it with {go_on}")
        return run, newest
    run = Run(path.parent.parent)
    if not run.recipe.is_file() or not path.is_dir() or not CHECKPOINT_NAME.fullmatch(path.name):
        raise UsageError(
            f"{path}: not a run folder (no recipe.yaml) and not a checkpoint of one; name RUN, "
            "RUN/checkpoints/step_NUMBER, open_clip:ARCH:FILE, or a folder with open_clip_config.json or config.json"
        )
    return run, path
