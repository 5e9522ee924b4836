"""Self-distilled registers: a trained backbone learns to do without artifacts, from unlabelled images.

After Chen et al. ("Vision Transformers with Self-Distilled Registers", NeurIPS 2025): the teacher is the backbone
itself, whose patch features are brought together over shifted and mirrored views (`lostreg.training.teacher`); the
student is a copy with new register tokens, a part of which is unlocked, and learns to give these features in one look.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lostreg import defaults
from lostreg.checks import real_number, whole_number, whole_seed
from lostreg.errors import LostregWarning, OptionError, TrainingError, is_out_of_memory
from lostreg.images.decode import ImageSource, name_of
from lostreg.inference.stream import draw_sample
from lostreg.jsonio import whole_file, write_json
from lostreg.models.backbone import Backbone
from lostreg.models.checkpoints import save_with_registers
from lostreg.models.forward import Grid
from lostreg.progress import OnProgress, Progress, telling
from lostreg.runs.folder import locked
from lostreg.runs.results import check_same_run, describe_device, run_facts
from lostreg.training.student import make_student, patch_tokens, unlock
from lostreg.training.teacher import Lessons, Teacher, pixels_of
from lostreg.training.views import AGGREGATES, Layout, View, crop

TRAINING_FILE: Final = "training.json"
CHECKPOINT_FILE: Final = "checkpoint.pt"
TEACHER_FOLDER: Final = "teacher"
_HELD_OUT: Final = 0.1  # of the images
_MOST_HELD_OUT: Final = 256
_WARM_UP: Final = 0.1  # of the steps
_LAST_RATE: Final = 5e-6
_LOOKS: Final = 20  # at the held-out images, over all steps
_ALIKE: Final = 4.0  # medians of the gap between a look and its views from which only the views count
_SMALLEST: Final = 1e-6
_SMALLEST_EPS: Final = 1e-12
_NARROWEST: Final = 0.6  # shorter side of what the student sees over the longer one
_PATIENCE: Final = 5  # looks without a better one


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the weights that a training ends with, beside the backbone and the images.

    Attributes:
        registers: how many tokens are added; 0 is the control, in which nothing but the loss is new.
        steps: updates, at most: training ends early where the held-out loss does not fall any more.
        max_side: side of the square windows that teacher and student see, in pixels, at most.
        views: of each picture that the teacher looks at, the first of them straight.
        aggregate: how the teacher brings views together, a name of `AGGREGATES`.
        learning_rate: of AdamW at its highest; it falls to 5e-6.
        unlock: which parts of the student learn, see `PARTS`.
        batch_size: pictures a step.
        sample: how many images are learned from at most, drawn at random.
        seed: of that sample, the views, the order of pictures and the new registers.

    Raises:
        OptionError: if one is outside its range.

    Example:
        >>> lostreg.TrainingOptions(registers=16).unlock
        ('registers', 'positions')
    """

    registers: int = defaults.TRAINING_REGISTERS
    steps: int = defaults.TRAINING_STEPS
    max_side: int = defaults.TRAINING_SIDE
    views: int = defaults.TRAINING_VIEWS
    aggregate: str = defaults.AGGREGATES[0]
    learning_rate: float = defaults.LEARNING_RATE
    unlock: tuple[str, ...] = defaults.UNLOCKED
    batch_size: int = defaults.BATCH_SIZE
    sample: int = defaults.TRAINING_IMAGES
    seed: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {"registers": whole_number(self.registers, "registers", least=0, most=4096)}
        plain |= {
            name: whole_number(getattr(self, name), name)
            for name in ("steps", "max_side", "views", "batch_size", "sample")
        }
        plain["learning_rate"] = real_number(
            self.learning_rate, "learning_rate", least=1e-12, most=1, expected="a number above 0 and at most 1"
        )
        plain["unlock"], plain["seed"] = tuple(self.unlock), whole_seed(self.seed)
        if self.aggregate not in AGGREGATES:
            raise OptionError(f"aggregate must be one of {', '.join(AGGREGATES)}, not '{self.aggregate}'")
        vars(self).update(plain)


@dataclass(frozen=True)
class Look:
    """The loss at one moment of the training.

    Attributes:
        step: updates before it.
        loss: mean over the steps since the look before; None at the start.
        held_out: over pictures that are not learned from.
        cosine: the part of ``held_out`` that is 1 - cosine.
        learning_rate: of the step before.
    """

    step: int
    loss: float | None
    held_out: float
    cosine: float
    learning_rate: float


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        weights: the file that ``--weights`` and `load_backbone` take with the same backbone.
        registers: how many it has that the backbone has not.
        images: that were learned from.
        held_out: that the loss was measured on.
        unreadable: that were left out.
        best_step: updates that the weights in the file have seen: those with the lowest held-out loss.
        curve: of the losses.
    """

    weights: Path
    registers: int
    images: int
    held_out: int
    unreadable: int
    best_step: int
    curve: tuple[Look, ...]


def train_registers(
    images: Sequence[ImageSource],
    backbone: Backbone,
    out: str | Path,
    options: TrainingOptions | None = None,
    *,
    teacher: str | Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> Trained:
    """Add registers to a trained backbone, and have it learn to use them, from unlabelled images.

    A training that was stopped goes on from its last checkpoint to the same weights, and one that has ended is not
    repeated.

    Args:
        images: unlabelled: files, PIL images or arrays, as `Discoverer.discover` takes them; two at least.
        backbone: frozen, in float32, on the device to train on; stays as it is.
        out: folder for the weights, a checkpoint and what the training says of itself.
        options: everything else that decides the weights.
        teacher: folder for the teacher's features, which trainings that differ in nothing but the student (registers,
            steps, learning rate, what is unlocked, batch size) may share; ``out/teacher`` unless given.
        overwrite: whether to start anew instead of going on; the teacher's features are kept where they fit.
        on_progress: called after each image of the teacher and each step.

    Raises:
        OptionError: if an option does not suit the backbone or the images, or the disk is too small.
        BackboneError: if the backbone takes no registers.
        TrainingError: if fewer than two images can be used, or the teacher's folder holds features of something else.
        PredictionsError: if the folder cannot be written, is in use, or holds a training with other settings.

    Example:
        >>> backbone = lostreg.load_backbone("dinov2_vits14")
        >>> options = lostreg.TrainingOptions(registers=4, steps=2, max_side=112, views=2, batch_size=1)
        >>> images = [np.full((160, 200, 3), colour, np.uint8) for colour in (0, 255)]
        >>> trained = lostreg.train_registers(images, backbone, "out", options)
        >>> trained.weights.name, trained.registers
        ('registers.safetensors', 4)
    """
    options, folder = options or TrainingOptions(), Path(out)
    if backbone.registers is not None:
        raise OptionError("registers cannot be trained beside test-time registers: give the backbone without")
    if backbone.dtype != torch.float32:
        raise OptionError(f"a backbone is trained in float32, not {backbone.dtype}")
    sources = draw_sample(images, options.sample, options.seed)
    settings = _settings(sources, backbone, options)
    with locked(folder):
        results = folder / TRAINING_FILE
        if overwrite:
            for name in (TRAINING_FILE, CHECKPOINT_FILE, defaults.TRAINED_FILE):
                (folder / name).unlink(missing_ok=True)
        earlier = check_same_run(results, settings) if results.exists() else {}
        if earlier.get("complete") and (folder / defaults.TRAINED_FILE).exists():
            return _trained(folder, options, earlier)
        training = _Training(folder, backbone, options, Path(teacher or folder / TEACHER_FOLDER), on_progress)
        if not earlier:  # what does not fit the backbone has been told, and ties the folder to nothing
            write_json(results, {"complete": False, **settings})
        return training.run(sources, settings)


def _settings(sources: Sequence[ImageSource], backbone: Backbone, options: TrainingOptions) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(map(name_of, sources)).encode("utf-8", "surrogateescape"))
    return {
        "training": {**asdict(options), "unlock": list(options.unlock)},
        "backbone": {"name": backbone.spec.name, "weights": backbone.weights},
        "images": {"count": len(sources), "fingerprint": digest.hexdigest()},
    }


def _trained(folder: Path, options: TrainingOptions, results: dict[str, Any]) -> Trained:
    return Trained(
        folder / defaults.TRAINED_FILE,
        options.registers,
        results["learned_from"],
        results["held_out"],
        results["unreadable"],
        results["best_step"],
        tuple(Look(**look) for look in results["curve"]),
    )


def losses(tokens: Tensor, own: Tensor, agreed: Tensor, norms: tuple[nn.Module, nn.Module]) -> tuple[Tensor, Tensor]:
    """How far a student's tokens are from what the teacher says of the patches that it saw.

    What views do not agree on is an artifact of the straight look, and what they agree on is to be left as it is. With
    the gap g of a patch, 1 - cosine(own, agreed) after the final norm, its target is own + m (agreed - own),
    m = min(1, g / (4 median g)).

    Args:
        tokens: of the student before the final norm, shape (B, N, D).
        own: of the teacher's own look at the same windows, of the same shape.
        agreed: over its views, of the same shape; not a number where no view reaches.
        norms: the student's final norm, and the teacher's.

    Returns:
        Mean of 1 - cosine over patches, after the final norms, and the squared error before them over the mean square
        of the targets: a norm hides how long a token is, and artifacts are long. Neither depends on the backbone's
        scale.
    """
    seen = agreed[..., 0].isfinite()
    tokens, own, agreed = tokens[seen].float(), own[seen].float(), agreed[seen].float()
    gap = 1 - functional.cosine_similarity(norms[1](own), norms[1](agreed), dim=-1)
    share = (gap / (_ALIKE * gap.median()).clamp(min=_SMALLEST)).clamp(max=1)[:, None]
    target = own + share * (agreed - own)
    cosine = 1 - functional.cosine_similarity(norms[0](tokens), norms[1](target), dim=-1)
    return cosine.mean(), functional.mse_loss(tokens, target) / target.square().mean()


class _Training:
    """A training in a folder that is held."""

    def __init__(
        self, folder: Path, backbone: Backbone, options: TrainingOptions, teacher: Path, on_progress: OnProgress
    ) -> None:
        self._folder = folder
        self._options = options
        self._backbone = backbone
        self._layout = Layout.of(options.max_side, backbone.spec.patch_size)
        self._teacher = Teacher(backbone, self._layout, options.views, options.aggregate, options.seed)
        self._lessons = Lessons(teacher, self._teacher)
        self._student = make_student(backbone, options.registers, options.seed)
        self._norms = (cast("nn.Module", self._student.model.norm), cast("nn.Module", backbone.model.norm))
        self._unlocked = unlock(self._student, options.unlock)
        groups = [{"params": [parameter]} for parameter in self._unlocked.values()]
        self._optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0)
        self._on_progress = on_progress
        self._step = 0
        self._saves_memory = False
        self._curve: list[Look] = []
        self._held_out_looks: dict[int, Tensor] = {}  # the teacher's own, of each batch by its start
        self._best: dict[str, Tensor] = {}

    def run(self, sources: Sequence[ImageSource], settings: dict[str, Any]) -> Trained:
        start = time.perf_counter()
        names = ("max_side", "views", "aggregate", "sample", "seed")
        choices = {name: settings["training"][name] for name in names}
        self._lessons.claim({"teacher": choices, "backbone": settings["backbone"], "images": settings["images"]})
        numbers = self._learn_pictures(sources)
        held_out = numbers[:: max(2, min(len(numbers), round(1 / _HELD_OUT)))][:_MOST_HELD_OUT]
        pictures = sorted(set(numbers) - set(held_out))
        known = self._load()
        recent: list[float] = []
        if not self._curve:
            self._look(held_out, recent)
        while self._step < self._options.steps and not self._has_settled():
            recent.append(self._update(pictures))
            self._step += 1
            if self._step % self._pace == 0 or self._step == self._options.steps:
                self._look(held_out, recent)
                recent = []
                self._save()
            self._tell(known)
        best = min(self._curve, key=lambda look: look.held_out)
        with torch.no_grad():
            for name, parameter in self._unlocked.items():
                parameter.copy_(self._best[name])
        with whole_file(self._folder / defaults.TRAINED_FILE) as beside:
            save_with_registers(self._student.model, self._options.registers, beside)
        results = {
            "complete": True,
            "learned_from": len(pictures),
            "held_out": len(held_out),
            "unreadable": len(sources) - len(numbers),
            "best_step": best.step,
            "curve": [asdict(look) for look in self._curve],
            **settings,
            **run_facts(self._step - known, time.perf_counter() - start),
            "device": describe_device(self._backbone.device),
        }
        write_json(self._folder / TRAINING_FILE, results)
        return _trained(self._folder, self._options, results)

    def _learn_pictures(self, sources: Sequence[ImageSource]) -> list[int]:
        """The numbers of the images that have a lesson, once each has gone through the teacher."""
        outcomes = telling(self._lessons.make(sources), len(sources), self._on_progress, "teacher")
        errors = list(outcomes)
        numbers = [number for number, error in enumerate(errors) if error is None]
        if len(numbers) < 2:
            reason = next((f": {error}" for error in errors if error is not None), "")
            raise TrainingError(
                f"{len(numbers)} of {len(sources)} images can be used, expected 2 at least, one to learn from and one "
                f"to be held out{reason}"
            )
        return numbers

    @property
    def _pace(self) -> int:
        return max(1, self._options.steps // _LOOKS)

    def _has_settled(self) -> bool:
        best = min(range(len(self._curve)), key=lambda place: self._curve[place].held_out)
        return len(self._curve) - 1 - best >= _PATIENCE

    def _update(self, pictures: Sequence[int]) -> float:
        """One step on the next pictures; which they are, and what is seen of them, depends on step and seed alone."""
        size, count = self._options.batch_size, len(pictures)
        generator = np.random.default_rng([self._options.seed, 1, self._step])
        places = range(self._step * size, (self._step + 1) * size)
        orders = {epoch: self._order(epoch, count) for epoch in {place // count for place in places}}
        chosen = [pictures[orders[place // count][place % count]] for place in places]
        shape = self._draw_shape(generator)
        views = [self._draw_view(shape, generator) for _ in chosen]
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self._step)
        try:
            loss = self._backward(chosen, views, shape)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._saves_memory:
                raise TrainingError(
                    f"out of memory on {self._student.device} with {size} images a step: use a smaller --batch-size or "
                    "--max-side"
                ) from error
            loss = None
        if loss is None:
            message = f"out of memory on {self._student.device}: computing what is inside blocks twice from now on"
            warnings.warn(message, LostregWarning, stacklevel=2)
            self._saves_memory = True
            return self._update(pictures)
        if self._step == 0:
            # Adam's steps have one size, however small the gradient: what artifacts do not concern would drift by its
            # noise. With an epsilon as large as a tensor's first gradient it moves as little as its gradient is small.
            for group in self._optimizer.param_groups:
                gradient = group["params"][0].grad
                group["eps"] = max(float(gradient.square().mean().sqrt()), _SMALLEST_EPS)
        self._optimizer.step()
        return loss

    def _backward(self, numbers: Sequence[int], views: Sequence[View], shape: Grid) -> float:
        self._optimizer.zero_grad()
        cosine, square, _ = self._losses(numbers, views, shape)
        loss = cosine + square
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _draw_shape(self, generator: np.random.Generator) -> Grid:
        """A grid as photos have them, so that positions are learned on all of them: one side is a window's."""
        window = self._layout.window
        other = int(generator.integers(math.ceil(_NARROWEST * window), window, endpoint=True))
        return (window, other) if generator.integers(2) else (other, window)

    def _draw_view(self, shape: Grid, generator: np.random.Generator) -> View:
        row, column = (int(generator.integers(self._layout.picture - side, endpoint=True)) for side in shape)
        return View(row, column, bool(generator.integers(2)))

    def _order(self, epoch: int, count: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._options.seed, 2, epoch]).permutation(count).tolist()
        return order

    def _rate(self, step: int) -> float:
        """Linear up, then half a cosine down."""
        highest, steps = self._options.learning_rate, self._options.steps
        warm = max(1, round(_WARM_UP * steps))
        if step < warm:
            return highest * (step + 1) / warm
        lowest = min(_LAST_RATE, highest)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    def _losses(
        self, numbers: Sequence[int], views: Sequence[View], shape: Grid, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both losses, and the teacher's own look, which is taken unless it is given."""
        device = self._student.device
        pixels, agreed = [], []
        for number, view in zip(numbers, views, strict=True):
            lesson = self._lessons[number]
            patches = torch.from_numpy(lesson.patches).to(device)
            pixels.append(pixels_of(patches, [view], shape, self._backbone))
            agreed.append(crop(torch.from_numpy(lesson.features), view, shape).flatten(0, 1).to(device))
        together = torch.cat(pixels)
        own = self._teacher.look(together, shape) if own is None else own
        images = self._as_images(together, shape)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = patch_tokens(self._student, images, save_memory=self._saves_memory)
        return *losses(tokens, own, torch.stack(agreed), self._norms), own

    def _as_images(self, pixels: Tensor, shape: Grid) -> Tensor:
        """(B, rows * columns, patch * patch * 3) to (B, 3, H, W)."""
        (rows, columns), patch = shape, self._layout.patch
        cut = pixels.view(len(pixels), rows, columns, patch, patch, 3)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(pixels), 3, rows * patch, columns * patch)

    @torch.no_grad()
    def _look(self, held_out: Sequence[int], recent: Sequence[float]) -> None:
        """Measure the held-out loss, and keep the parameters where it is the lowest so far."""
        size, sums = self._options.batch_size, np.zeros(2)
        for start in range(0, len(held_out), size):
            batch = held_out[start : start + size]
            middle = [self._layout.middle] * len(batch)
            own = self._held_out_looks.get(start)  # the same each time
            *parts, own = self._losses(batch, middle, self._layout.shape, own)
            self._held_out_looks[start] = own
            sums += [len(batch) * float(part) for part in parts]
        cosine, square = (sums / len(held_out)).tolist()
        if not math.isfinite(cosine + square):
            raise TrainingError("the loss is not finite: the weights are broken, or the learning rate is far too high")
        if not self._best or cosine + square < min(look.held_out for look in self._curve):
            self._best = {name: parameter.detach().clone() for name, parameter in self._unlocked.items()}
        mean = sum(recent) / len(recent) if recent else None
        self._curve.append(Look(self._step, mean, cosine + square, cosine, self._rate(max(0, self._step - 1))))

    def _save(self) -> None:
        state = {
            "step": self._step,
            "curve": [asdict(look) for look in self._curve],
            "student": {name: parameter.detach() for name, parameter in self._unlocked.items()},
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
        }
        with whole_file(self._folder / CHECKPOINT_FILE) as beside:
            torch.save(state, beside)

    def _load(self) -> int:
        """Go on from the checkpoint, if there is one: how many steps it has seen."""
        path = self._folder / CHECKPOINT_FILE
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location=self._student.device, weights_only=True)
            with torch.no_grad():
                for name, parameter in self._unlocked.items():
                    parameter.copy_(state["student"][name])
            self._optimizer.load_state_dict(state["optimizer"])
            self._step, self._best = state["step"], state["best"]
            self._curve = [Look(**look) for look in state["curve"]]
        except Exception as error:  # the unpickler raises whatever the bytes of a damaged file lead it to
            raise TrainingError(f"{path} is damaged: delete it, and the training begins anew") from error
        return self._step

    def _tell(self, known: int) -> None:
        look = self._curve[-1]
        self._on_progress(
            Progress(self._step, self._options.steps, known, "training", note=f"held-out loss {look.held_out:.4f}")
        )
