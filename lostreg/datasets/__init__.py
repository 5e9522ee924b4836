"""Benchmarks: images with ground-truth boxes, and where they come from."""

from lostreg.datasets.base import Benchmark, Example, require_images
from lostreg.datasets.frames import choose_frames
from lostreg.datasets.registry import BENCHMARKS, FETCHABLE, find_benchmarks, load_benchmark

__all__ = [
    "BENCHMARKS",
    "FETCHABLE",
    "Benchmark",
    "Example",
    "choose_frames",
    "find_benchmarks",
    "load_benchmark",
    "require_images",
]
