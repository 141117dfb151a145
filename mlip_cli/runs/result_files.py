"""Results as typed values: read from JSON, which is checked, and written as JSON into RUN/evals/. No torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from mlip_cli.files import read_object, write_json

Checked = TypeVar("Checked")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command measured. A field with the default None is left out of the JSON while it is None."""

    KIND: ClassVar[str]
    """The key `kind` of the JSON."""

    step: int | None
    """Step of the checkpoint; None for a model without one."""
    measured_at: str | None = None
    mlip_version: str | None = None

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The result that a JSON value holds. Keys that this version does not know are dropped.

        Raises:
            ValueError: a key is missing or has a wrong value; the text names the first one.
        """
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if value.get("kind") != cls.KIND:
            raise ValueError(f"kind: {value.get('kind')!r} instead of {cls.KIND!r}")
        return checked(cls, value)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result that a file holds.

        Raises:
            ValueError: the file is not such a result; the text says why.
        """
        return cls.from_json(read_object(path))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"kind": self.KIND, **json_value(self)}

    def write(self, path: Path) -> None:
        """Replace the file atomically; its folder is made where it is missing."""
        path.parent.mkdir(exist_ok=True)
        write_json(path, self.to_json())

    def why_unstored(self, path: Path) -> str | None:
        """Write the file; what was measured must be printed even where that fails, so an error comes back as words."""
        try:
            self.write(path)
        except OSError as error:
            return f"{path}: {error.strerror}; what was measured is printed, but not stored"
        return None


def json_value(value: Any) -> Any:
    """Dataclasses become objects and tuples become lists; the field `class_` is the key `class`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name.rstrip("_"): json_value(own)
            for field in dataclasses.fields(value)
            if (own := getattr(value, field.name)) is not None or field.default is not None
        }
    if isinstance(value, dict):
        return {key: json_value(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(own) for own in value]
    return value


def checked(kind: type[Checked], value: dict[str, Any]) -> Checked:
    """A dataclass from JSON's values; keys that it does not know are dropped.

    Raises:
        ValueError: a key is missing or has a wrong value; the text names the first one.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))  # such as speed.0.per_s
        wrong = " is missing" if fault["type"] == "missing" else f": {fault['msg']}"
        raise ValueError(f"{place}{wrong}") from None
