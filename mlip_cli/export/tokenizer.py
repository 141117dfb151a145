"""Files of a tokenizer in Hugging Face's layout."""

from pathlib import Path

from mlip_cli.data.tokenizer import tokenizer_from
from mlip_cli.files import write_bytes, write_json
from mlip_cli.recipe.config import Text


def write_tokenizer(text: Text, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of a tower that has another tokenizer than CLIP's."""
    own = text.tokenizer
    if own is None:
        return
    tokens = tokenizer_from(own.file)
    special = {"pad_token": tokens.id_to_token(own.pad_id)}
    if text.eos_id is not None:
        special["eos_token"] = tokens.id_to_token(text.eos_id)
    if own.zero_id is not None:
        special["sep_token"] = tokens.id_to_token(own.zero_id)
    write_bytes(folder / "tokenizer.json", Path(own.file).read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text.context_length}
    write_json(folder / "tokenizer_config.json", settings | special)
