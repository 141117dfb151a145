"""The summary of prepared data: what prepared.json holds, what a user reads of it, and the next command."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip_cli.data.prepare.filters import OWN_SPLITS
from mlip_cli.data.prepare.retry import num_retryable
from mlip_cli.data.sources.records import MAX_CAPTIONS, MAX_HELD_OUT, held_out_share
from mlip_cli.errors import UsageError
from mlip_cli.files import parse_object
from mlip_cli.paths import inside, is_url
from mlip_cli.terminal.output import plural, print_table, say, say_to_copy, warn

if TYPE_CHECKING:
    from mlip_cli.recipe.config import Recipe

HELD_OUT = ("validation", "combinations", "test")
"""Splits to measure on during training, the first that there is."""

FEW_HELD_OUT = 10
"""Fewer held-out samples are worth a warning."""

STEPS_AN_EPOCH = 8
"""The least steps an epoch of the trainings that are proposed."""

FEWEST_TO_TRAIN = 4 * STEPS_AN_EPOCH
"""The fewest pairs for which a training is proposed: batches of four."""

CARD_PAGE = "card.html"
"""Beside prepared.json: what was prepared, for a person."""

DEMO_FOLDER = Path("data/openmoji")
"""The folder that recipes/openmoji.yaml reads."""


@dataclass(frozen=True)
class SplitSummary:
    """One split of the prepared data."""

    num_samples: int
    num_bytes: int
    fingerprint: str
    num_shards: int
    distinct_captions: int | None = None
    """None in summaries of earlier versions."""
    holds: str | None = None
    """In words, where the source says more than the name of the split."""


@dataclass(frozen=True)
class Summary:
    """Prepared data, in the order of prepared.json."""

    out: str
    source: str
    request: dict[str, Any]
    """Format, options and fingerprint of the source."""
    rows: int
    rejects: int
    reasons: dict[str, int]
    """Rejects by reason."""
    splits: dict[str, SplitSummary]
    held_out: bool
    """True if we drew validation, because the source has no splits."""
    attribution: str | None
    seconds: float
    next: dict[str, str]
    """Trainings to go on with, by the hardware they need."""
    pictures: int
    """Samples and rejects. Rows that name one picture are one; a row that cannot be used is a reject by itself."""
    passed_over: dict[str, int]
    """What was found beside that and not read, or found by another spelling, by kind."""
    cleaning: dict[str, int] = field(default_factory=dict)
    """repeats: samples of training whose pixels an earlier one has. in_validation, in_test: such that the source's own
    split has too. captions_left_out: captions that fell to a rule, or are too many, while others of the same picture
    stay."""

    @classmethod
    def read(cls, path: Path) -> "Summary":
        """Read prepared.json.

        Raises:
            UsageError: the file is not one of ours.
        """
        return cls.parse(path.read_bytes(), place=str(path))

    @classmethod
    def parse(cls, content: bytes, *, place: str) -> "Summary":
        """The same of the bytes of prepared.json at `place`."""
        try:
            fields = parse_object(content)
            splits = {split: SplitSummary(**values) for split, values in fields["splits"].items()}
            earlier = {"pictures": fields["rows"], "passed_over": {}}  # each row was a picture, and nothing was counted
            return cls(**(earlier | fields | {"splits": splits}))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{place}: not written by mlip prepare-data; name another folder") from None

    def show_splits(self) -> None:
        """Print a row a split to stdout."""
        rows = [
            [name, split.num_samples, split.num_shards, f"{split.num_bytes / 2**20:.1f}"]
            for name, split in self.splits.items()
        ]
        print_table(["split", "samples", "shards", "MiB"], rows)

    def show_notes(self) -> None:
        """Say to stderr what was held out and rejected, and the next command."""
        for name, split in self.splits.items():
            if split.holds:
                say(f"{name}/ holds {split.holds}")
        self._show_held_out()
        num_samples = self.pictures - self.rejects
        pictures = f", {plural(self.pictures, 'picture')}" if self.pictures != self.rows else ""
        say(f"{plural(self.rows, 'row')}{pictures}: {plural(num_samples, 'sample')}, {plural(self.rejects, 'reject')}")
        for reason, n in self.reasons.items():
            say(f"  {n:,} x {reason}")
        if (n := num_retryable(self.reasons)) and not is_url(self.out):
            say(f"{n:,} of them may succeed later: the same command with --retry-failed")
        if self.rejects:
            say(f"each reject with file, row and reason: {inside(self.out, 'rejects.parquet')}")
        if (card := Path(self.out) / CARD_PAGE).is_file():
            say(f"card: {card}")
        for line in self.repeats():
            say(line)
        for line in self.overlaps():
            warn(line)
        if self.attribution:
            say(self.attribution)
        for need, command in self.next.items():
            say(f"next, with {need}:")
            say_to_copy(command)
        if "train" not in self.splits:
            limit = "; --limit takes the first rows of the source" if self.request["limit"] else ""
            warn(f"nothing to train on: all samples are of the source's {' and '.join(self.splits)} split{limit}")
        elif not self.next:
            warn(f"fewer than {FEWEST_TO_TRAIN} samples to train on: too few for a contrastive loss")

    def repeats(self) -> Iterator[str]:
        """What the rules for captions took, and equal pictures that are still there."""
        if n := self.cleaning.get("captions_left_out", 0):
            why = f"by the rules for captions or as more than {MAX_CAPTIONS} of a picture"
            yield f"{plural(n, 'caption')} left out {why}; other captions of these pictures stay"
        if (n := self.cleaning.get("repeats", 0)) and self.request["format"] != "openmoji":
            repeat = f"{plural(n, 'sample')} {'repeats' if n == 1 else 'repeat'} the picture of an earlier one"
            yield f"{repeat}; --dedupe pixels leaves {'it' if n == 1 else 'them'} out"

    def overlaps(self) -> Iterator[str]:
        """Pictures to train on that the source's own held-out splits have too."""
        for split in OWN_SPLITS if self.request["format"] != "openmoji" else ():
            if n := self.cleaning.get(f"in_{split}", 0):
                same = f"{plural(n, 'sample')} to train on {'has' if n == 1 else 'have'} a picture of the source's own"
                yield f"{same} {split} split; --exclude {split} leaves {'it' if n == 1 else 'them'} out"

    def _show_held_out(self) -> None:
        holdout = held_out_share(self.request["holdout"], self.pictures)
        if self.held_out:
            num_held_out = self.splits["validation"].num_samples
            num_samples = plural(self.pictures - self.rejects, "sample")
            say(
                f"validation/ is {num_held_out:,} of {num_samples}, held out by the hash of the pixels "
                f"(--holdout {holdout:g}, at most {MAX_HELD_OUT:,}); the source has no splits"
            )
            if num_held_out < FEW_HELD_OUT:
                few = plural(num_held_out, "sample")
                cure = "say --holdout 0.2 for more" if holdout < 0.2 else "take more pictures"
                warn(f"validation/ has {few}, too few to measure by; {cure}")
        elif holdout and not self.splits.keys() & {"validation", "test"}:
            warn(f"no picture was held out: {holdout:.0%} of so few; say --holdout 0.2 for a validation split")


@dataclass(frozen=True)
class SharePrepared:
    """What a run with --part has done."""

    out: str
    part: str
    """The share, as in 1/3."""
    prepared: int
    """Parts of the share that this run prepared."""
    found: int
    """Those that were there already."""
    parts: int
    """Of the whole source."""
    missing: int
    """Of the whole source, which nobody has prepared yet."""

    def show_notes(self) -> None:
        """Say in one line what was done and what comes next."""
        found = f", {self.found:,} were there" if self.found else ""
        done = f"{self.out}: part {self.part}: {plural(self.prepared, 'part')} prepared{found}"
        is_one = self.parts == 1
        rest = f"{'the only one is' if is_one else f'all {self.parts:,} are'} there; next"
        if self.missing:
            left = "the only one" if is_one else f"{self.missing:,} of all {self.parts:,}"
            rest = f"{left} {'is' if self.missing == 1 else 'are'} left to other machines; after them"
        say(f"{done}; {rest}: the same command with --finish instead of --part")


def attributions(cards: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The attributions that licences of prepared data ask for, each text once. `cards` are those of dataset.json."""
    found = [card.get("provenance", {}).get("attribution") for card in cards]
    return tuple(dict.fromkeys(text for text in found if text))


def next_commands(format: str, out: Path | str, splits: Mapping[str, SplitSummary]) -> dict[str, str]:
    """Trainings to go on with, by the hardware they need. `out` is a folder or a URL.

    None for a few pictures, and none on what the source calls its validation or test split.
    """
    from mlip_cli.recipe.load import load_recipe, override  # here, because each worker process imports this module

    if format == "openmoji" and str(out) == str(DEMO_FOLDER):
        return {"no GPU": "mlip pretrain recipes/openmoji.yaml"}
    if "train" not in splits or splits["train"].num_samples < FEWEST_TO_TRAIN:
        return {}
    num_samples, distinct = splits["train"].num_samples, splits["train"].distinct_captions
    held_out = next((split for split in HELD_OUT if split in splits), None)
    changes = [
        override("data.train", inside(str(out), "train")),
        override("data.validation", inside(str(out), held_out) if held_out else None),
    ]
    if distinct is not None and 2 * distinct <= num_samples:  # else pictures of one class are each other's negatives
        changes.append("losses.positives=concept")
    recipes = {"no GPU": "openmoji"} if format == "openmoji" else {"no GPU": "laptop", "one GPU": "single_gpu"}
    return {
        need: shlex.join(["mlip", "pretrain", name, *changes, *_fitted(load_recipe(name).recipe, num_samples)])
        for need, name in recipes.items()
    }


def _fitted(recipe: "Recipe", num_samples: int) -> Iterator[str]:
    """Changes that give an epoch at least eight steps, and a warm-up of at most a tenth of all steps."""
    train = recipe.train
    batch_size = min(train.global_batch_size, 1 << ((num_samples // STEPS_AN_EPOCH).bit_length() - 1))
    steps = train.steps or (train.epochs or 0) * (num_samples // batch_size)
    if batch_size < train.global_batch_size:
        yield f"train.global_batch_size={batch_size}"
    if recipe.optim.warmup_steps > steps // 10:
        yield f"optim.warmup_steps={max(1, steps // 10)}"
