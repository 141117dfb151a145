"""Results of retrieval as RUN/evals/ has them. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlip_cli.evaluate.results import EvaluatedResult, Recalls


@dataclass(frozen=True, kw_only=True)
class RetrievalResult(EvaluatedResult):
    """Retrieval both ways among all pictures and captions of a data set."""

    KIND: ClassVar[str] = "retrieval"

    num_texts: int
    """Distinct captions."""
    image_to_text: Recalls
    text_to_image: Recalls
    median_rank: dict[str, float]
    """By direction: the place of the first right answer, from 1."""
    picture_of_text: str | None
    """For each text the number of its first picture, with spaces between them; None: no picture has two texts."""

    @property
    def recalls(self) -> dict[str, Recalls]:
        """By direction."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}

    def clusters(self, measure: str) -> Sequence[int] | None:
        """Texts of one picture belong together."""
        if self.picture_of_text is None or not measure.startswith("text_to_image"):
            return None
        return [int(number) for number in self.picture_of_text.split()]
