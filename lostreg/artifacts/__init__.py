"""The artifacts of Vision Transformers: high-norm tokens, what they hold, and how LOST sees them.

found = lostreg.artifacts.measure(paths, lostreg.Discoverer("dinov2_vits14"))
lostreg.artifacts.write_report(Path("report"), [found], {})
"""

from lostreg.artifacts.measurement import Measurement, measure
from lostreg.artifacts.report import as_numbers, write_report

__all__ = ["Measurement", "as_numbers", "measure", "write_report"]
