"""Find the main object of an image without labels: LOST on frozen Vision Transformers.

d = lostreg.Discoverer("dinov2_vits14_reg")
d.discover("dog.jpg").xyxy
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lostreg.errors import LostregError
from lostreg.models.table import BACKBONES, BackboneSpec

if TYPE_CHECKING:
    from lostreg import artifacts
    from lostreg.artifacts.attention import AttentionMaps, attention_maps
    from lostreg.artifacts.register_search import find_registers
    from lostreg.datasets import load_benchmark
    from lostreg.images.allocator import keep_freed_memory
    from lostreg.inference.batches import MapBatches
    from lostreg.inference.calibrate import calibrate
    from lostreg.inference.calibration import Calibration
    from lostreg.inference.discoverer import Discoverer
    from lostreg.inference.discovery import Discovery
    from lostreg.inference.learn import learn
    from lostreg.inference.objectness import Objectness
    from lostreg.inference.options import Options
    from lostreg.inference.study import Study
    from lostreg.methods.lost import LostResult, lost_boxes
    from lostreg.models.backbone import Backbone, load_backbone
    from lostreg.models.features import patch_features
    from lostreg.models.registers import RegisterNeurons
    from lostreg.probing.data import load_probe_data
    from lostreg.probing.probe import probe
    from lostreg.training.options import TrainingOptions
    from lostreg.training.train import Trained, train_registers

    __version__: str

__all__ = [
    "BACKBONES",
    "AttentionMaps",
    "Backbone",
    "BackboneSpec",
    "Calibration",
    "Discoverer",
    "Discovery",
    "LostResult",
    "LostregError",
    "MapBatches",
    "Objectness",
    "Options",
    "RegisterNeurons",
    "Study",
    "Trained",
    "TrainingOptions",
    "artifacts",
    "attention_maps",
    "calibrate",
    "find_registers",
    "keep_freed_memory",
    "learn",
    "load_backbone",
    "load_benchmark",
    "load_probe_data",
    "lost_boxes",
    "patch_features",
    "probe",
    "train_registers",
]

# Loaded when first asked for: PyTorch takes seconds to import, and `lostreg --help` does not need it.
_HOMES = {
    "AttentionMaps": "artifacts.attention",
    "attention_maps": "artifacts.attention",
    "Backbone": "models.backbone",
    "load_backbone": "models.backbone",
    "Calibration": "inference.calibration",
    "calibrate": "inference.calibrate",
    "learn": "inference.learn",
    "MapBatches": "inference.batches",
    "Objectness": "inference.objectness",
    "load_benchmark": "datasets",
    "Discoverer": "inference.discoverer",
    "patch_features": "models.features",
    "LostResult": "methods.lost",
    "lost_boxes": "methods.lost",
    "Discovery": "inference.discovery",
    "find_registers": "artifacts.register_search",
    "RegisterNeurons": "models.registers",
    "keep_freed_memory": "images.allocator",
    "Options": "inference.options",
    "load_probe_data": "probing.data",
    "probe": "probing.probe",
    "Study": "inference.study",
    "Trained": "training.train",
    "TrainingOptions": "training.options",
    "train_registers": "training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # email, csv and zipfile come with it

        return metadata.version("lostreg")
    if name == "artifacts":
        return import_module("lostreg.artifacts")
    if name not in _HOMES:
        raise AttributeError(f"module 'lostreg' has no attribute '{name}'")
    return getattr(import_module(f"lostreg.{_HOMES[name]}"), name)
