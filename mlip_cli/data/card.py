"""dataset.json, the card of a prepared data set: which shards there are, how many samples each has, their hashes."""

import json
from typing import Any

from mlip_cli.errors import UsageError


def parse_card(content: bytes, *, place: str, folder: str) -> dict[str, Any]:
    """The card of `folder` from the bytes of its dataset.json at `place`.

    Raises:
        UsageError: it is no card, or one of no samples.
    """
    try:
        card = json.loads(content)
        shards = [(shard["name"], int(shard["n"])) for shard in card["shards"]]
        fingerprint = card["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place}: not written by mlip prepare-data ({error!r}); prepare the data again") from error
    if not fingerprint or sum(n for _, n in shards) == 0:
        raise UsageError(f"{folder}: the data set holds no samples; prepare it again (mlip prepare-data)")
    return dict(card)
