"""Find the objects of images without labels: LOST and others on frozen Vision Transformers.

discoverer = lostreg.Discoverer("dinov2_vits14_reg")
discoverer.discover("dog.jpg").xyxy
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lostreg import errors as errors
from lostreg.models import table as _table  # noqa: F401 - so that lostreg.models.table is there, as it always was

if TYPE_CHECKING:
    from lostreg import artifacts as artifacts
    from lostreg import metrics as metrics
    from lostreg.artifacts.attention import AttentionMaps as AttentionMaps
    from lostreg.artifacts.attention import attention_maps as attention_maps
    from lostreg.artifacts.register_search import find_registers as find_registers
    from lostreg.datasets import load_benchmark as load_benchmark
    from lostreg.errors import LostregError as LostregError
    from lostreg.images.allocator import keep_freed_memory as keep_freed_memory
    from lostreg.images.boxes import pairwise_iou as pairwise_iou
    from lostreg.inference.batches import MapBatches as MapBatches
    from lostreg.inference.calibrate import calibrate as calibrate
    from lostreg.inference.calibration import Calibration as Calibration
    from lostreg.inference.discoverer import Discoverer as Discoverer
    from lostreg.inference.discovery import Discovery as Discovery
    from lostreg.inference.discovery import to_pandas as to_pandas
    from lostreg.inference.learn import learn as learn
    from lostreg.inference.objectness import Objectness as Objectness
    from lostreg.inference.options import Options as Options
    from lostreg.inference.study import Study as Study
    from lostreg.methods.lost import LostResult as LostResult
    from lostreg.methods.lost import Objects as Objects
    from lostreg.methods.lost import lost_boxes as lost_boxes
    from lostreg.methods.multi_object import lost_objects as lost_objects
    from lostreg.metrics import Corloc as Corloc
    from lostreg.metrics import Detections as Detections
    from lostreg.metrics import DetectionScores as DetectionScores
    from lostreg.metrics import corloc as corloc
    from lostreg.metrics import detection_scores as detection_scores
    from lostreg.metrics import score_auc as score_auc
    from lostreg.models.backbone import Backbone as Backbone
    from lostreg.models.backbone import load_backbone as load_backbone
    from lostreg.models.features import patch_features as patch_features
    from lostreg.models.own import own_backbone as own_backbone
    from lostreg.models.registers import RegisterNeurons as RegisterNeurons
    from lostreg.models.table import BACKBONES as BACKBONES
    from lostreg.models.table import BackboneSpec as BackboneSpec
    from lostreg.probing.data import load_probe_data as load_probe_data
    from lostreg.probing.probe import probe as probe
    from lostreg.runs.predictions import Prediction as Prediction
    from lostreg.runs.predictions import read_predictions as read_predictions
    from lostreg.training.options import TrainingOptions as TrainingOptions
    from lostreg.training.train import Trained as Trained
    from lostreg.training.train import train_registers as train_registers

    __version__: str

# Every public name by group: the module that it comes from, and what it is. Loaded when first asked for: PyTorch takes
# seconds to import, and `lostreg --help` does not need it.
_PUBLIC: Final = {
    "Discover": {
        "Discoverer": ("inference.discoverer", "finds the objects of images: one backbone, one set of options"),
        "Options": ("inference.options", "its options"),
        "Discovery": ("inference.discovery", "what was found in an image: boxes, scores, masks, pictures"),
        "to_pandas": ("inference.discovery", "several discoveries as a table"),
        "Study": ("inference.study", "one image whose features are kept, for trying options"),
        "MapBatches": ("inference.batches", "tables of images in, tables with boxes out: Ray Data, Spark, Dask"),
        "calibrate": ("inference.calibrate", "one Gram bias for a collection"),
        "Calibration": ("inference.calibration", "that bias, and how it was found"),
        "learn": ("inference.learn", "what unlabelled images teach about objects"),
        "Objectness": ("inference.objectness", "what was learned"),
    },
    "Features": {
        "BACKBONES": ("models.table", "the backbone table"),
        "BackboneSpec": ("models.table", "a row of it"),
        "load_backbone": ("models.backbone", "a backbone with its weights"),
        "own_backbone": ("models.own", "a model of one's own as a backbone: timm's, or any function"),
        "Backbone": ("models.backbone", "a frozen model, and how it is fed"),
        "patch_features": ("models.features", "queries, keys, values or tokens of a layer, one vector a patch"),
    },
    "Methods": {
        "lost_boxes": ("methods.lost", "LOST: features in, the main object of each image out"),
        "LostResult": ("methods.lost", "the main objects of a batch"),
        "lost_objects": ("methods.multi_object", "features in, several objects of each image out"),
        "Objects": ("methods.lost", "the objects of an image"),
    },
    "Metrics": {
        "corloc": ("metrics", "share of images whose first box hits an object"),
        "Corloc": ("metrics", "that share, with its interval"),
        "detection_scores": ("metrics", "average precision and recall of several boxes an image"),
        "Detections": ("metrics", "boxes and ground truth of an image, for these"),
        "DetectionScores": ("metrics", "these figures"),
        "score_auc": ("metrics", "how well scores tell hits from misses"),
        "pairwise_iou": ("images.boxes", "intersection over union of boxes"),
        "metrics": ("metrics", "the module, which has more"),
    },
    "Benchmarks and runs": {
        "load_benchmark": ("datasets", "images with ground-truth boxes: VOC, COCO, COCO 20k"),
        "read_predictions": ("runs.predictions", "a predictions file, checked"),
        "Prediction": ("runs.predictions", "a line of one"),
    },
    "Registers and artifacts": {
        "artifacts": ("artifacts", "the package: measure outlier tokens, and report them"),
        "attention_maps": ("artifacts.attention", "what CLS and registers attend to in an image"),
        "AttentionMaps": ("artifacts.attention", "these maps"),
        "find_registers": ("artifacts.register_search", "the neurons of test-time registers"),
        "RegisterNeurons": ("models.registers", "these neurons, as a file keeps them"),
        "train_registers": ("training.train", "registers for a backbone that was trained without"),
        "TrainingOptions": ("training.options", "its options"),
        "Trained": ("training.train", "what came of a training"),
        "load_probe_data": ("probing.data", "images with classes, masks or depths"),
        "probe": ("probing.probe", "linear evaluation of frozen tokens"),
    },
    "More": {
        "LostregError": ("errors", "what every mistake of a user raises; its kinds are in lostreg.errors"),
        "keep_freed_memory": ("images.allocator", "quicker forwards on a CPU, where the C library is glibc"),
    },
}
_HOMES: Final = {name: home for group in _PUBLIC.values() for name, (home, _) in group.items()}

__all__ = [name for group in _PUBLIC.values() for name in group]
__doc__ = "\n\n".join(
    [
        str(__doc__).rstrip(),
        *(
            "\n".join([f"{title}:", *(f"    {name:17}  {what}" for name, (_, what) in group.items())])
            for title, group in _PUBLIC.items()
        ),
    ]
)


if not TYPE_CHECKING:  # for a checker of types any name would be one

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib import metadata  # email, csv and zipfile come with it

            return metadata.version("lostreg")
        if name not in _HOMES:
            raise AttributeError(f"module 'lostreg' has no attribute '{name}'")
        home = import_module(f"lostreg.{_HOMES[name]}")
        return home if _HOMES[name] == name else getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "errors", "__version__", *(name for name in globals() if name.startswith("__"))]
