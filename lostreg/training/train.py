"""Self-distilled registers: a trained backbone learns to do without artifacts, from unlabelled images.

After Chen et al. ("Vision Transformers with Self-Distilled Registers", NeurIPS 2025): the teacher is the backbone
itself, whose patch features are brought together over shifted and mirrored views (`lostreg.training.teacher`); the
student is a copy with new register tokens, a part of which is unlocked, and learns to give these features in one look.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from lostreg import defaults
from lostreg.errors import ImageError, LostregWarning, OptionError, TrainingError, is_out_of_memory
from lostreg.images.decode import ImageSource, name_of
from lostreg.inference.stream import draw_sample
from lostreg.jsonio import whole_file, write_json
from lostreg.models.backbone import Backbone, check_backbone
from lostreg.models.checkpoints import save_with_registers
from lostreg.models.pixels import joined
from lostreg.progress import OnProgress, Progress, telling
from lostreg.runs.folder import locked
from lostreg.runs.results import check_same_run, describe_device, run_facts
from lostreg.training.loss import Targets, losses, targets_of
from lostreg.training.options import TrainingOptions
from lostreg.training.processes import Processes
from lostreg.training.schedule import Batch, Schedule
from lostreg.training.student import make_student, patch_tokens, unlock
from lostreg.training.teacher import Lessons, Teacher, pixels_of
from lostreg.training.views import Layout, crop

TRAINING_FILE: Final = "training.json"
CHECKPOINT_FILE: Final = "checkpoint.pt"
TEACHER_FOLDER: Final = "teacher"
_HELD_OUT: Final = 0.1  # of the images
_MOST_HELD_OUT: Final = 256
_LOOKS: Final = 20  # at the held-out images, over all steps
_SMALLEST_EPS: Final = 1e-12
_PATIENCE: Final = 5  # looks without a better one


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
    repeated. Processes that a launcher has started, `torchrun` or `accelerate launch`, share it: each calls this alike.

    Args:
        images: unlabelled: files, PIL images or arrays, as `Discoverer.discover` takes them; two at least.
        backbone: frozen, in float32, on the device to train on; stays as it is.
        out: folder for the weights, a checkpoint and what the training says of itself.
        options: everything else that decides the weights.
        teacher: folder for the teacher's features, which trainings that differ in nothing but the student (registers,
            steps, learning rate, what is unlocked, batch size) may share; ``out/teacher`` unless given.
        overwrite: whether to start anew instead of going on; the teacher's features are kept where they fit.
        on_progress: called after each image of the teacher and each step, in the first process.

    Raises:
        OptionError: if an option does not suit the backbone, the images or the number of processes, the disk is too
            small, or there are several processes without Accelerate or a GPU each.
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
    check_backbone(backbone)
    options, folder = options or TrainingOptions(), Path(out)
    processes = Processes.meet(backbone.device)
    if options.batch_size % processes.count:
        raise OptionError(
            f"batch_size must be a multiple of {processes.count}, the number of processes, not {options.batch_size}"
        )
    if backbone.registers is not None:
        raise OptionError("registers cannot be trained beside test-time registers: give the backbone without")
    if backbone.dtype != torch.float32:
        raise OptionError(f"a backbone is trained in float32, not {backbone.dtype}")
    sources = draw_sample(images, options.sample, options.seed)
    settings = _settings(sources, backbone, options)
    with locked(folder) if processes.is_main else nullcontext():
        with processes.main_first():  # the others find the folder as it leaves it
            results = folder / TRAINING_FILE
            if overwrite and processes.is_main:
                for name in (TRAINING_FILE, CHECKPOINT_FILE, defaults.TRAINED_FILE):
                    (folder / name).unlink(missing_ok=True)
            earlier = check_same_run(results, settings) if results.exists() else {}
            if earlier.get("complete") and (folder / defaults.TRAINED_FILE).exists():
                return _trained(folder, options, earlier)
            training = _Training(
                folder, backbone, options, Path(teacher or folder / TEACHER_FOLDER), on_progress, processes
            )
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


class _Training:
    """A training in a folder that is held."""

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        options: TrainingOptions,
        teacher: Path,
        on_progress: OnProgress,
        processes: Processes,
    ) -> None:
        self._folder = folder
        self._options = options
        self._backbone = backbone
        self._layout = Layout.of(options.max_side, backbone.spec.patch_size)
        self._schedule = Schedule(options, self._layout)
        self._teacher = Teacher(backbone, self._layout, options.views, options.aggregate, options.seed)
        self._lessons = Lessons(teacher, self._teacher)
        self._student = make_student(backbone, options.registers, options.seed)
        self._norms = (cast("nn.Module", self._student.model.norm), cast("nn.Module", backbone.model.norm))
        self._unlocked = unlock(self._student, options.unlock)
        groups = [{"params": [parameter]} for parameter in self._unlocked.values()]
        self._optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0)
        self._processes = processes
        self._on_progress = on_progress if processes.is_main else lambda _: None
        self._step = 0
        self._saves_memory = False
        self._curve: list[Look] = []
        self._held_out: dict[int, Targets] = {}  # the same each time, of each batch by its start
        self._best: dict[str, Tensor] = {}

    def run(self, sources: Sequence[ImageSource], settings: dict[str, Any]) -> Trained:
        start = time.perf_counter()
        names = ("max_side", "views", "aggregate", "sample", "seed")
        choices = {name: settings["training"][name] for name in names}
        with self._processes.main_first():
            made_of = {"teacher": choices, "backbone": settings["backbone"], "images": settings["images"]}
            self._lessons.claim(made_of, len(sources))
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
            "processes": self._processes.count,
        }
        if self._processes.is_main:
            with whole_file(self._folder / defaults.TRAINED_FILE) as beside:
                save_with_registers(self._student.model, self._options.registers, beside)
            write_json(self._folder / TRAINING_FILE, results)
        self._processes.wait()
        return _trained(self._folder, self._options, results)

    def _learn_pictures(self, sources: Sequence[ImageSource]) -> list[int]:
        """The numbers of the images that have a lesson, once each has gone through the teacher."""
        outcomes = self._make_lessons(sources)
        errors = list(telling(outcomes, len(sources), self._on_progress, "teacher"))
        numbers = [number for number, error in enumerate(errors) if error is None]
        if len(numbers) < 2:
            reason = next((f": {error}" for error in errors if error is not None), "")
            raise TrainingError(
                f"{len(numbers)} of {len(sources)} images can be used, expected 2 at least, one to learn from and one "
                f"to be held out{reason}"
            )
        return numbers

    def _make_lessons(self, sources: Sequence[ImageSource]) -> Iterator[ImageError | None]:
        """What came of each image, in their order: of several processes each has every so many of them."""
        own = self._lessons.make(sources, range(self._processes.index, len(sources), self._processes.count))
        for _ in range(0, len(sources), self._processes.count):
            yield from self._processes.gather_items(list(islice(own, 1)))

    @property
    def _pace(self) -> int:
        return max(1, self._options.steps // _LOOKS)

    def _has_settled(self) -> bool:
        best = min(range(len(self._curve)), key=lambda place: self._curve[place].held_out)
        return len(self._curve) - 1 - best >= _PATIENCE

    def _update(self, pictures: Sequence[int]) -> float:
        """One step on the next pictures; which they are, and what is seen of them, depends on step and seed alone."""
        processes = self._processes
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self._step)
        self._optimizer.zero_grad()
        batch = self._schedule.batch(self._step, pictures).share(processes.index, processes.count)
        pixels, agreed = self._see(batch)
        targets = targets_of(self._teacher.look(pixels, batch.shape), agreed, self._norms[1], processes)
        loss, is_short = 0.0, False
        try:
            loss = self._backward(joined(pixels, batch.shape, self._layout.patch), targets)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            is_short = True
        loss, short = processes.total([loss, float(is_short)])  # nobody goes on where one cannot
        if short:
            return self._save_memory(pictures)
        for parameter in self._unlocked.values():
            parameter.grad = processes.mean(cast("Tensor", parameter.grad))
        if self._step == 0:
            # Adam's steps have one size, however small the gradient: what artifacts do not concern would drift by its
            # noise. With an epsilon as large as a tensor's first gradient it moves as little as its gradient is small.
            for group in self._optimizer.param_groups:
                gradient = group["params"][0].grad
                group["eps"] = max(float(gradient.square().mean().sqrt()), _SMALLEST_EPS)
        self._optimizer.step()
        return loss / processes.count

    def _save_memory(self, pictures: Sequence[int]) -> float:
        """The step again, with less memory."""
        device = self._student.device.type
        if self._saves_memory:
            raise TrainingError(
                f"out of memory on {device} with {self._options.batch_size} images a step: use a smaller --batch-size "
                "or --max-side"
            )
        message = f"out of memory on {device}: computing what is inside blocks twice from now on"
        warnings.warn(message, LostregWarning, stacklevel=3)
        self._saves_memory = True
        return self._update(pictures)

    def _backward(self, images: Tensor, targets: Targets) -> float:
        cosine, square = self._losses(images, targets)
        loss = cosine + square
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _losses(self, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        device = self._student.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            tokens = patch_tokens(self._student, images, save_memory=self._saves_memory)
        return losses(tokens, targets, self._norms)

    def _see(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pixels of windows as `pixels_of` gives them, and the tokens that the teacher's views agree on there."""
        device = self._student.device
        pixels, agreed = [], []
        for number, view in zip(batch.numbers, batch.views, strict=True):
            lesson = self._lessons[number]
            patches = torch.from_numpy(lesson.patches).to(device)
            pixels.append(pixels_of(patches, [view], batch.shape, self._backbone))
            agreed.append(crop(torch.from_numpy(lesson.features), view, batch.shape).flatten(0, 1).to(device))
        return torch.cat(pixels), torch.stack(agreed)

    @torch.no_grad()
    def _look(self, held_out: Sequence[int], recent: Sequence[float]) -> None:
        """Measure the held-out loss, and keep the parameters where it is the lowest so far."""
        size, shape, sums = self._options.batch_size, self._layout.shape, np.zeros(2)
        for start in range(0, len(held_out), size)[self._processes.index :: self._processes.count]:
            numbers = held_out[start : start + size]
            pixels, agreed = self._see(Batch(numbers, [self._layout.middle] * len(numbers), shape))
            if start not in self._held_out:
                self._held_out[start] = targets_of(self._teacher.look(pixels, shape), agreed, self._norms[1])
            parts = self._losses(joined(pixels, shape, self._layout.patch), self._held_out[start])
            sums += [len(numbers) * float(part) for part in parts]
        cosine, square = (total / len(held_out) for total in self._processes.total(sums.tolist()))
        if not math.isfinite(cosine + square):
            raise TrainingError("the loss is not finite: the weights are broken, or the learning rate is far too high")
        if not self._best or cosine + square < min(look.held_out for look in self._curve):
            self._best = {name: parameter.detach().clone() for name, parameter in self._unlocked.items()}
        mean = sum(recent) / len(recent) if recent else None
        self._curve.append(Look(self._step, mean, cosine + square, cosine, self._schedule.rate(max(0, self._step - 1))))

    def _save(self) -> None:
        if not self._processes.is_main:
            return
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
