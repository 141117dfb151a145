"""Upload an exported folder to the Hugging Face Hub, or to another server that HF_ENDPOINT names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlip_cli import __version__
from mlip_cli.errors import RunError, UsageError
from mlip_cli.terminal.output import draws

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "log in with hf auth login, or set HF_TOKEN to a token that may write"


def check_push(repo: str) -> None:
    """Check the name of the repository and that there is a token. Nothing is sent.

    Raises:
        UsageError: a name that the Hub does not take, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        why = str(error).splitlines()[0].removesuffix(".")
        raise UsageError(f"--push {repo}: not the name of a repository ({why}); write OWNER/NAME") from None
    if get_token() is None:
        raise UsageError(f"--push {repo}: no token of Hugging Face; {LOGIN}")


def push(folder: Path, repo: str) -> str:
    """Upload every file of `folder` in one commit and return the address of the repository.

    A repository that does not exist is made, and is private. In one that exists, other files stay. A name without an
    owner is that of the token's user.

    Raises:
        UsageError: see `check_push`.
        RunError: the server cannot be reached, or refuses; nothing is committed then.
    """
    check_push(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not draws():
        disable_progress_bars()
    api = HfApi()
    with _explained(api, repo):
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=f"Exported by mlip {__version__}")
    return str(made)


@contextmanager
def _explained(api: "HfApi", repo: str) -> Iterator[None]:
    """Errors of the library in one line with a cure."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise RunError(f"--push {repo}: HF_HUB_OFFLINE forbids it; unset it and repeat the command") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or "").strip().splitlines()
        words = f"status {status}" + (f", {said[0]}" if said else "")
        raise RunError(f"--push {repo}: {api.endpoint} refused it ({words}); {_cure(status, repo)}") from error
    except (HTTPError, OSError, ValueError) as error:  # the last one where an answer is not what it should be
        words = " ".join(str(error).split()) or type(error).__name__
        cure = "check the network, HF_ENDPOINT and the rights of the token, and repeat the command"
        raise RunError(f"--push {repo}: the upload to {api.endpoint} failed ({words}); {cure}") from error


def _cure(status: int, repo: str) -> str:
    """What to do about a refusal."""
    owner = repo.partition("/")[0] if "/" in repo else "your account"
    if status == 401:
        return f"the token is not valid, or not for this repository; {LOGIN}"
    if status in (403, 404):
        return f"use a token that may write to {owner}, or another name: the repository may be somebody else's"
    if status == 400:
        return "use another name, or correct what the server names"
    return "repeat the command later"
