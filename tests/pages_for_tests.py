"""Pages without the charts of training, which take most of the time to draw."""

import pytest

from mlip_cli.report import comparison, run_page
from mlip_cli.report.page import section


def without_curves(patch: pytest.MonkeyPatch) -> None:
    """Leave the section of curves empty."""
    for module in (run_page, comparison):
        patch.setattr(module, "curves_section", lambda *_, **__: section("curves", "Curves"))
