"""Values that the Python API and the command line share. Imports nothing, so that `lostreg --help` stays quick."""

from typing import Final, Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]

PREDICTIONS_FILE: Final = "predictions.jsonl"  # of the folder of a run
RESULTS_FILE: Final = "results.json"
MAPS_FILE: Final = "maps.jsonl"
BACKBONE: Final = "dinov2_vits14_reg"
BACKBONE_VARIABLE: Final = "LOSTREG_BACKBONE"  # of the environment: defaults of the command line
DEVICE_VARIABLE: Final = "LOSTREG_DEVICE"
PRECISIONS: Final[tuple[Precision, ...]] = ("auto", "fp32", "bf16", "fp16")
PUBLISHED_METHODS: Final = ("tokencut", "maskcut", "dinoseg")  # of others, which have no bias
METHODS: Final = ("lost", "parts", *PUBLISHED_METHODS)
K_PATCHES: Final = 100  # as in LOST's published code
BATCH_SIZE: Final = 8
CUDA_BATCH_SIZE: Final = 64
MAX_SIDE: Final = 1024
CALIBRATION_IMAGES: Final = 512
REGISTER_IMAGES: Final = 128
TRAINED_FILE: Final = "registers.safetensors"  # of the folder of a training
TRAINING_REGISTERS: Final = 4
TRAINING_STEPS: Final = 400
TRAINING_SIDE: Final = 224
TRAINING_VIEWS: Final = 10
TRAINING_IMAGES: Final = 4096
AGGREGATES: Final = ("median", "mean", "trimmed")
LEARNING_RATE: Final = 2e-3
UNLOCKED: Final = ("registers", "positions")
OBJECTNESS_IMAGES: Final = 512
LEAST_TEACHERS: Final = 64  # images from which on `discover` learns from them; docs/objects.md
MOST_TEACHERS: Final = 128  # that a run which learns from its own images looks at first
ARTIFACT_IMAGES: Final = 256
OVERLAP: Final = 0.5  # further boxes that overlap one before them as much are left out
CLEAR_SCORE: Final = 0.25  # docs/bias.md: boxes with a lower score hit half as often
PROBE_TASKS: Final = ("classification", "segmentation", "depth", "zero-shot")
PROBE_TOKENS: Final = ("cls", "cls+mean", "mean")
PROBE_SIDE: Final = 448
ZERO_SHOT_SIDE: Final = 224  # what CLIP was trained with
PROBE_SEEDS: Final = 5
IGNORED: Final = (255,)  # of index masks: the outlines of VOC
MAX_PIXELS: Final = 200_000_000
