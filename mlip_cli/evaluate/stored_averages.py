"""Averages of weights on data sets: stored results are read, and only missing ones are measured.

Torch is imported only where something is measured or written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlip_cli import __version__
from mlip_cli.data.open import open_sources
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.average_results import AverageResult, Coefficients, Ingredient
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.stored import PROTOCOL, EvaluatedCheckpoint
from mlip_cli.evaluate.wanted import FAILURES, VALIDATION, Failures, WantedData
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import differences
from mlip_cli.runs.folder import Run, evaluation_precision, now, step_of
from mlip_cli.terminal.output import plural, say, warn

if TYPE_CHECKING:
    from mlip_cli.runs.average import Mixture
    from mlip_cli.runs.loading import LoadedRun

MOST_NAMED = 3
"""So many keys are named in a message."""


def check_same_form(recipes: Mapping[str, Recipe]) -> None:
    """Check that all recipes describe one architecture, which reads the same pixels and tokens.

    Merging, drop-out and the start change no tensor.

    Args:
        recipes: by the folder of the run.

    Raises:
        UsageError: two differ; the message names the keys, or the tokenizers.
    """
    (first, own), *others = recipes.items()
    free = (
        *("model.init", "model.freeze", "model.merging", "model.text.dropout", "model.text.tokenizer.file"),
        *("model.vision.drop_path", "model.vision.init"),
    )
    cure = f"average a run with one that was tuned from it: mlip pretrain RECIPE model.init={first}"
    for other, recipe in others:
        wrong = [
            f"{key} {mine} (in {first} {theirs})"
            for key, theirs, mine in differences(own, recipe)
            if key.startswith(("model.", "data.image_size", "data.resize", "data.pixel_")) and not key.startswith(free)
        ]
        if wrong:
            more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
            raise UsageError(
                f"{other}: another architecture than {first}: {'; '.join(wrong[:MOST_NAMED])}{more}; {cure}"
            )
        if own.model.text.tokenizer is not None and not Run(Path(other)).holds_tokenizer_of(own):
            raise UsageError(f"{other}: its {Run(Path(other)).tokenizer.name} is not that of {first}; {cure}")


class Averages:
    """The averages of some checkpoints. The weights are loaded when the first of them is needed."""

    def __init__(
        self,
        checkpoints: Sequence[EvaluatedCheckpoint],
        points: Sequence[Coefficients],
        *,
        batch_size: int,
        device: str,
        precision: str | None,
    ) -> None:
        self._checkpoints, self._points, self._last = checkpoints, points, checkpoints[-1].run
        self._precision = precision
        empty = AverageResult(
            step=step_of(checkpoints[-1].folder),
            ingredients=[_ingredient(own) for own in checkpoints],
            batch_size=batch_size,
            device=device,
            datasets=[],
        )
        identity = [
            PROTOCOL,
            [own.sha256 for own in checkpoints],
            batch_size,
            device,
            *([precision] if precision else []),
        ]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        self._path = self._last.evals / f"average-{key}.json"
        known = self._known()
        if known is not None:
            empty = replace(empty, device_type=known.device_type, precision=known.precision, datasets=known.datasets)
        self._result = empty
        self._opened: tuple[LoadedRun, Mixture] | None = None

    def measured(self, data: WantedData) -> tuple[AverageResult, Failures, str | None]:
        """The points on all data sets; errors of the other data sets; what could not be stored.

        Each data set is stored when it is done.

        Raises:
            UsageError: a checkpoint is damaged, or the weights have no average.
        """
        failures: Failures = dict(data.failures)
        shown, unstored = replace(self._result, datasets=[]), None
        for name, benchmark in data.found.items():
            try:
                fingerprint = self._fingerprint(benchmark)
            except FAILURES as error:
                failures[name] = error
                continue
            known = self._result.of_data(name, fingerprint)
            missing = [point for point in self._points if not known or not all(own.has([point]) for own in known)]
            if missing:
                loaded, mixture = self._open()
                from mlip_cli.evaluate.average import measure_averages

                say(f"{name}: {plural(len(missing), 'average')} to measure, in turn on each batch")
                try:
                    found = measure_averages(loaded, mixture, benchmark, missing, batch_size=self._result.batch_size)
                except FAILURES as error:
                    failures[name] = error
                    continue
                self._result = replace(
                    self._result.with_data(found),
                    device_type=loaded.device.type,
                    precision=loaded.precision,
                    measured_at=now(),
                    mlip_version=__version__,
                )
                unstored = self._result.why_unstored(self._path) or unstored
            own = [data.of(self._points) for data in self._result.of_data(name, fingerprint)]
            shown = replace(self._result, datasets=[*shown.datasets, *own])
        return shown, failures, unstored

    def write(self, chosen: Coefficients, out: Path, *, beside: AverageResult) -> None:
        """Write an average as a run, with what was measured of it and of the others.

        Raises:
            UsageError: a checkpoint is damaged, the weights have no average, or `out` exists.
            RunError: the disk is full.
        """
        _, mixture = self._open()
        from mlip_cli.runs.average import averaged, write_averaged_run

        shares = zip(self._result.ingredients, chosen, strict=True)
        write_averaged_run(
            out,
            self._last,
            step=step_of(self._checkpoints[-1].folder),
            weights={name: tensor.cpu() for name, tensor in averaged(mixture.weights, chosen).items()},
            origin={
                "kind": AverageResult.KIND,
                "made_at": now(),
                "mlip_version": __version__,
                "runs": [{**vars(own), "coefficient": share} for own, share in shares],
            },
        )
        if beside.datasets:
            beside.write(Run(out).evals / self._path.name)

    def _fingerprint(self, benchmark: Benchmark | None) -> str:
        """Of a data set; None: the validation set of the last run's recipe."""
        if benchmark is not None:
            return benchmark.fingerprint
        data = self._last.read_recipe().data
        if data.validation is None:
            raise UsageError(
                f"{VALIDATION}: the recipe of {self._last.folder} has no data.validation; name another data set"
            )
        return " ".join(own.fingerprint for own in open_sources(data.validation, cache=data.cache))

    def _open(self) -> "tuple[LoadedRun, Mixture]":
        """The model of the last run, and the weights of all."""
        if self._opened is None:
            say("loading PyTorch and the weights")
            from mlip_cli.runs.average import load_mixture

            folders = {own.label: own.folder for own in self._checkpoints}
            self._opened = load_mixture(folders, device=self._result.device, precision=self._precision)
        return self._opened

    def _known(self) -> AverageResult | None:
        """What was measured before; None where the file is missing, damaged or of another precision."""
        if not self._path.is_file():
            return None
        try:
            result = AverageResult.read(self._path)
        except ValueError as error:
            warn(f"{self._path}: damaged ({error}); measured again")
            return None
        wanted = self._precision or evaluation_precision(self._last.read_recipe(), result.device_type)
        return result if result.precision == wanted else None


def _ingredient(checkpoint: EvaluatedCheckpoint) -> Ingredient:
    return Ingredient(
        run=checkpoint.label,
        folder=str(checkpoint.run.folder.resolve()),
        checkpoint=checkpoint.folder.name,
        step=step_of(checkpoint.folder),
        sha256=checkpoint.sha256,
    )
