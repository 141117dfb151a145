"""Which pictures training saw: by the data set that holds them, else by their bytes."""

from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.open import open_sources
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.search_pictures import FoundPicture
from mlip_cli.paths import is_url
from mlip_cli.runs.loading import LoadedRun
from mlip_cli.terminal.output import plural

MOST_COMPARED = 200_000
"""More training pictures are not read for their bytes: that would take longer than the search."""


@dataclass(frozen=True)
class TrainedPictures:
    """The training pictures of a run, as far as they are known."""

    fingerprints: Collection[str]
    """Of the data sets that training read."""
    digests: Collection[bytes] | None
    """SHA-256 of every training picture, as stored and as it was before; None: they were not read."""
    words: str
    """What the answers rest on, or why there are none."""

    def hold(self, picture: FoundPicture, data: str | None) -> bool | None:
        """Whether training saw a picture of the data set with this fingerprint; None: not known."""
        if data is not None and data in self.fingerprints:
            return True
        if self.digests is None:
            return None
        original = bytes.fromhex(picture.original_sha256) if picture.original_sha256 else b""
        return sha256(picture.content).digest() in self.digests or original in self.digests


def trained_pictures(loaded: LoadedRun, *, of: Collection[str | None]) -> TrainedPictures:
    """What is known of the training of a run, to tell pictures of the data sets `of` (fingerprints) apart."""
    cards = [card for role, card in loaded.run.read_cards().items() if role.split()[0] == "training"]
    fingerprints = [card.fingerprint for card in cards]
    if not cards:
        return TrainedPictures([], None, "not known which of them training saw: the run has no cards of its data")
    if set(of) <= set(fingerprints):
        return TrainedPictures(fingerprints, None, "training saw all of them: this is its data")
    num_samples = sum(card.num_samples for card in cards)
    why = None
    if num_samples > MOST_COMPARED:
        why = f"its {num_samples:,} pictures are too many to compare"
    elif any(is_url(source.path) for source in loaded.recipe.data.train):
        why = "they lie at a URL"
    else:
        try:
            datasets = open_sources(loaded.recipe.data.train, cache=loaded.recipe.data.cache)
            if [own.fingerprint for own in datasets] == fingerprints:
                return TrainedPictures(fingerprints, _digests(datasets), _words(loaded, num_samples))
            why = "other data lies in their place now"
        except (UsageError, RunError, OSError) as error:
            why = str(error).splitlines()[0]
    return TrainedPictures(fingerprints, None, f"not known which other pictures training saw: {why}")


def _words(loaded: LoadedRun, num_samples: int) -> str:
    """The rule in a sentence, and whose training it does not speak of."""
    words = f"seen in training: the bytes of the picture are among the {plural(num_samples, 'training picture')}"
    init = loaded.recipe.model.init or loaded.recipe.model.vision.init
    return f"{words}; what {init}, where the run began, was trained on is not known" if init else words


def _digests(datasets: Collection[ShardDataset]) -> set[bytes]:
    digests = set()
    for dataset in datasets:
        for id in range(dataset.num_samples):
            sample = dataset.read(id)
            digests.add(sha256(sample.image).digest())
            original = sample.info.fields.get("sha256")
            if isinstance(original, str):
                digests.add(bytes.fromhex(original))
    return digests
