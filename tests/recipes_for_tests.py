"""A recipe as small as can be, and how tests write recipes into the current folder."""

from pathlib import Path

SMALL = """
data: {train: data/a, image_size: 32}
model:
  vision: {patch_size: 8, width: 32, depth: 2, num_heads: 2}
train: {steps: 5, global_batch_size: 4}
"""


def write(name: str, text: str) -> str:
    """Write a file under the current folder and return its name; one newline at the start is left out."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text.removeprefix("\n"), encoding="utf-8")
    return name
