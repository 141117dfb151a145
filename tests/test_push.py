"""Upload of an exported folder, against a server of our own that speaks the Hub's protocol."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_for_tests import Hub, hub

from mlip_cli import __version__
from mlip_cli.errors import RunError, UsageError
from mlip_cli.export.push import check_push, push


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # large files go over HTTP
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with hub() as state:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", state.address)  # read from HF_ENDPOINT at import
        monkeypatch.setenv("HF_TOKEN", state.token)
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small and large files, in a folder below too."""
    own = tmp_path / "exported"
    (own / "below").mkdir(parents=True)
    (own / "README.md").write_text("---\ntags: [clip]\n---\n# A model\n")
    (own / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (own / "below" / "tokens.json").write_text('{"日本": "🙂"}')
    return own


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_arrives_to_the_byte_in_a_private_repository(server: Hub, folder: Path) -> None:
    assert push(folder, "somebody/model") == f"{server.address}/somebody/model"
    assert server.files == {"somebody/model": content(folder)}
    assert server.repositories == {"somebody/model": True}
    assert server.messages == [f"Exported by mlip {__version__}"]
    assert len(server.storage) == 1


def test_a_second_push_replaces_files_and_keeps_the_visibility(server: Hub, folder: Path) -> None:
    server.repositories["somebody/model"] = False
    server.files["somebody/model"] = {"README.md": b"old", "other.txt": b"stays"}
    push(folder, "somebody/model")
    assert server.files["somebody/model"] == content(folder) | {"other.txt": b"stays"}
    assert server.repositories == {"somebody/model": False}


def test_a_name_alone_is_that_of_the_user(server: Hub, folder: Path) -> None:
    assert push(folder, "model") == f"{server.address}/somebody/model"
    assert list(server.files) == ["somebody/model"]


def test_a_stored_token_is_used(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    stored = tmp_path / "token"
    stored.write_text(f"{server.token}\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(stored))
    push(folder, "somebody/model")
    assert server.files == {"somebody/model": content(folder)}


def test_the_server_is_the_one_that_the_environment_names(server: Hub, folder: Path) -> None:
    code = f"from pathlib import Path; from mlip_cli.export.push import push; print(push(Path({str(folder)!r}), 'a/b'))"
    server.user = "a"
    named = {"HF_ENDPOINT": server.address, "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | named, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr, ran.returncode) == (f"{server.address}/a/b\n", "", 0)
    assert server.files == {"a/b": content(folder)}


def test_without_a_token_nothing_is_sent(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError) as refused:
        push(folder, "somebody/model")
    assert str(refused.value) == (
        "--push somebody/model: no token of Hugging Face; log in with hf auth login, or set HF_TOKEN to a token that "
        "may write"
    )
    assert not server.asked


@pytest.mark.parametrize("name", ["a/b/c", "two words", "a--b", "", "x/y.git", "../x", "https://huggingface.co/a/b"])
def test_a_wrong_name_is_refused_before_anything_is_sent(server: Hub, name: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_push(name)
    assert re.fullmatch(
        rf"--push {re.escape(name)}: not the name of a repository \(.+\); write OWNER/NAME", str(refused.value)
    )
    assert not server.asked


def refusal(folder: Path, repo: str) -> str:
    with pytest.raises(RunError) as refused:
        push(folder, repo)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_token_that_is_not_valid(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert refusal(folder, "somebody/model") == (
        f"--push somebody/model: {server.address} refused it (status 401, Invalid username or password.); the token is "
        "not valid, or not for this repository; log in with hf auth login, or set HF_TOKEN to a token that may write"
    )


def test_a_namespace_of_somebody_else(server: Hub, folder: Path) -> None:
    assert refusal(folder, "another/model") == (
        f"--push another/model: {server.address} refused it (status 403, You don't have the rights to create a model "
        "under the namespace another); use a token that may write to another, or another name: the repository may be "
        "somebody else's"
    )


def test_an_existing_repository_of_somebody_else(server: Hub, folder: Path) -> None:
    server.repositories["another/model"] = False
    server.fails_with = 403
    assert refusal(folder, "another/model").startswith(f"--push another/model: {server.address} refused it (status 403")
    assert not server.files


def test_an_answer_that_is_not_the_protocols(server: Hub, folder: Path) -> None:
    server.refuses_large_files = True
    words = r"failed \(LFS batch API returned errors: .*no room.*\); check the network"
    assert re.search(words, refusal(folder, "somebody/model"))
    assert server.files == {}


def test_no_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert re.fullmatch(
        r"--push a/b: the upload to http://127\.0\.0\.1:9 failed \(.+\); "
        "check the network, HF_ENDPOINT and the rights of the token, and repeat the command",
        refusal(folder, "a/b"),
    )


def test_offline_by_the_users_wish(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(folder, "a/b") == "--push a/b: HF_HUB_OFFLINE forbids it; unset it and repeat the command"
    assert not server.asked
