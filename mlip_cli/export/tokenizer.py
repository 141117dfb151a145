"""Files of a tokenizer in Hugging Face's layout."""

import json
import string
from pathlib import Path
from typing import Any

from mlip_cli.data.tokenizer import tokenizer_from
from mlip_cli.files import read_object, write_bytes, write_json
from mlip_cli.recipe.config import Text


def write_tokenizer(text: Text, folder: Path, *, with_cleaning: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json of a tower that has another tokenizer than CLIP's.

    Args:
        with_cleaning: the file also does what cleans a caption before it, for programs that do not. Broken characters
            and HTML entities are not repaired there.
    """
    own = text.tokenizer
    if own is None:
        return
    tokens = tokenizer_from(own.file)
    special = {"pad_token": tokens.id_to_token(own.pad_id)}
    if text.eos_id is not None:
        special["eos_token"] = tokens.id_to_token(text.eos_id)
    if own.zero_id is not None:
        special["sep_token"] = tokens.id_to_token(own.zero_id)
    content = Path(own.file).read_bytes()
    if with_cleaning:
        content = json.dumps(_cleaning(read_object(Path(own.file)), own.clean), ensure_ascii=False).encode()
    write_bytes(folder / "tokenizer.json", content)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text.context_length}
    write_json(folder / "tokenizer_config.json", settings | special)


def _cleaning(description: dict[str, Any], clean: str) -> dict[str, Any]:
    """A tokenizer.json whose normalizer begins with a cleaning (`TokenizerFile.clean`)."""
    steps: list[dict[str, Any]] = []
    if clean == "canonicalize":
        steps.append({"type": "Replace", "pattern": {"Regex": f"[{_escaped(string.punctuation)}]"}, "content": ""})
    if clean in ("canonicalize", "lower"):
        steps.append({"type": "Lowercase"})
    steps.append({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    before = description.get("normalizer")
    normalizer = {"type": "Sequence", "normalizers": steps + ([before] if before else [])}
    return description | {"normalizer": normalizer}


def _escaped(characters: str) -> str:
    return "".join(f"\\{own}" for own in characters)
