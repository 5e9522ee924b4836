"""The artifacts of Vision Transformers: high-norm tokens, what they hold, and how LOST sees them.

found = lostreg.artifacts.measure(paths, lostreg.Discoverer("dinov2_vits14"))
lostreg.artifacts.write_report(Path("report"), [found], {})
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lostreg.artifacts.measurement import Measurement, measure
    from lostreg.artifacts.report import as_numbers, write_report

__all__ = ["Measurement", "as_numbers", "measure", "write_report"]

# Loaded when first asked for: the report needs matplotlib, the probes scikit-learn, and both take seconds to import.
_HOMES = {"Measurement": "measurement", "measure": "measurement", "as_numbers": "report", "write_report": "report"}


if not TYPE_CHECKING:  # for a checker of types any name would be one

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'lostreg.artifacts' has no attribute '{name}'")
        return getattr(import_module(f"lostreg.artifacts.{_HOMES[name]}"), name)
