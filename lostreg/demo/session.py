"""What the demo keeps: models for all visitors, and for each visitor the features of the last photos."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from lostreg.artifacts.attention import AttentionMaps, attention_maps
from lostreg.errors import ImageError, OptionError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.inference.options import Options
from lostreg.inference.study import Study
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import Feature

KEPT_MODELS: Final = 2
KEPT_STUDIES: Final = 2  # of each visitor
MAX_OBJECTS: Final = 10
MAX_REGISTERS: Final = 8

Tell = Callable[[str], None]
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class DemoSettings:
    """What the operator of the demo decides.

    Attributes:
        backbones: names that visitors choose from; the first is loaded at once.
        options: of every visitor, as far as these do not choose. An objectness is used with the backbone that it fits.
        max_upload_mb: larger files are refused.
        neurons: register neurons of one of the backbones; None hides test-time registers.
        method: what the page begins with.
        examples: photos that are offered to whoever has none at hand.
    """

    backbones: tuple[str, ...]
    options: Options
    max_upload_mb: int = 20
    neurons: RegisterNeurons | None = None
    method: str = "parts"
    examples: tuple[Path, ...] = ()

    def has_registers(self, backbone: str) -> bool:
        """Whether test-time registers can be added to a backbone."""
        return self.neurons is not None and self.neurons.backbone in ("", backbone)

    def chosen(self, backbone: str, feature: Feature, layer: int = -1, registers: int = 0) -> Options:
        """The options of a visitor who chose what needs a forward.

        Args:
            backbone: its name.
            feature: ``q``, ``k``, ``v`` or ``out``.
            layer: block index from 0, or from the end when negative.
            registers: blank tokens added to the photo; 0 for none.

        Raises:
            OptionError: if there is no such feature, or registers cannot be added.
        """
        neurons = None
        if registers:
            if self.neurons is None or not 0 < registers <= MAX_REGISTERS:
                raise OptionError(f"expected 0 to {MAX_REGISTERS} blank tokens, and neurons for them")
            neurons = replace(self.neurons, count=registers)
        return replace(self.options, backbone=backbone, feature=feature, layer=layer, registers=neurons)


class Models:
    """Discoverers by backbone, the last few that were used.

    Args:
        settings: of the demo.
        limit: how many stay loaded.
    """

    def __init__(self, settings: DemoSettings, limit: int = KEPT_MODELS) -> None:
        self.settings = settings
        self._limit = limit
        self._loaded: OrderedDict[str, Discoverer] = OrderedDict()

    def get(self, name: str) -> Discoverer:
        """The backbone with its default feature, loaded if need be.

        Raises:
            OptionError: if the demo does not offer it.
            BackboneError: if its weights cannot be had.
        """
        if name not in self.settings.backbones:
            raise OptionError(f"backbone must be one of {', '.join(self.settings.backbones)}, not '{name}'")
        if name not in self._loaded:
            while len(self._loaded) >= self._limit:  # first, so that both never need room at once
                self._loaded.popitem(last=False)
            options = {**vars(self.settings.options), "backbone": name, "objectness": None}
            self._loaded[name] = Discoverer(**options)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def is_loaded(self, name: str) -> bool:
        """Whether it would be given at once."""
        return name in self._loaded

    def misfit(self, name: str) -> str:
        """Why a backbone goes without the objectness of the demo; empty where it does not, or there is none."""
        loaded = self.get(name)
        try:
            loaded.with_objectness(self.settings.options.objectness)
        except OptionError as error:
            return str(error)
        return ""

    def discoverer(self, options: Options) -> Discoverer:
        """What a visitor's options describe, on the shared backbone; without an objectness that does not fit it.

        Raises:
            OptionError: if the backbone has no such layer or feature, or registers cannot be added.
            BackboneError: if its weights cannot be had.
        """
        name = str(options.backbone)
        objectness = None if self.misfit(name) else options.objectness
        return Discoverer(**{**vars(options), "backbone": self.get(name).backbone, "objectness": objectness})


@dataclass
class Visitor:
    """One visitor's photo, and what was computed for it.

    Attributes:
        photo: the uploaded file; None before the first.
        name: of the file, as the visitor knows it.
        study: what is looked at; None where there is nothing to show.
        found: in it, when a method last ran.
    """

    photo: Path | None = None
    name: str = ""
    study: Study | None = None
    found: Discovery | None = None
    _studies: OrderedDict[tuple[Path, Options], Study] = field(default_factory=OrderedDict)
    _attention: OrderedDict[tuple[Path, Options], AttentionMaps] = field(default_factory=OrderedDict)

    def take(self, photo: Path | None, name: str) -> None:
        """A new photo, or none."""
        self.photo, self.name, self.study, self.found = photo, name, None, None

    def look(self, models: Models, options: Options, tell: Tell) -> Study:
        """The features of the photo for some options: one forward, or none where they are kept.

        Raises:
            OptionError: if there is no photo, or the options do not fit the backbone.
            BackboneError: if the backbone cannot be loaded.
            ImageError: if the photo cannot be read.
        """
        self.study = self.found = None  # whatever fails from here on, no old answer stands beside the new choice
        photo = self._photo()
        key = (photo, options)
        if key not in self._studies:
            backbone = str(options.backbone)
            if not models.is_loaded(backbone):
                tell(f"Loading {backbone}")
                models.get(backbone)
            tell("Looking at the photo")
            self._studies[key] = Study(models.discoverer(options), photo)
        _trim(self._studies, key)
        self.study = self._studies[key]
        return self.study

    def discover(self, *, max_objects: int = 1, **changes: Any) -> Discovery:
        """A method on the kept features, see `Study.discover`; the answer is kept as `found`.

        Args:
            max_objects: how many to look for, at most.
            changes: the other options.

        Raises:
            OptionError: if there is nothing to search, or an option is out of its range or not to be had.
            ImageError: if the photo is needed again, and gone.
        """
        if self.study is None:
            raise OptionError("there is no photo here any more: please drop it again")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise OptionError(f"expected 1 to {MAX_OBJECTS} objects, not {max_objects}")
        self.found = self.study.discover(max_objects=max_objects, **changes)
        return self.found

    def attention(self, models: Models, options: Options) -> AttentionMaps:
        """What the tokens in front of the patches attend to in the last layer.

        Raises:
            OptionError: if there is no photo, or the backbone has no such token.
            ImageError: if the photo cannot be read.
        """
        photo = self._photo()
        key = (photo, replace(options, feature=None, layer=-1))  # which say nothing about attention
        if key not in self._attention:
            (found,) = attention_maps([photo], models.discoverer(options))
            if isinstance(found, ImageError):
                raise found
            self._attention[key] = found[0]
        _trim(self._attention, key)
        return self._attention[key]

    def _photo(self) -> Path:
        if self.photo is None:
            raise OptionError("there is no photo here yet: please drop one")
        return self.photo


def _trim(kept: OrderedDict[Key, Value], used: Key) -> None:
    kept.move_to_end(used)
    while len(kept) > KEPT_STUDIES:
        kept.popitem(last=False)
