"""The demo's page: what stands where, and which change asks for what."""

import asyncio
import html
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import gradio as gr

from lostreg.demo.looks import ATTENTION, INTRO, OBJECTS, START, TAUGHT, TITLE, caption, panel
from lostreg.demo.messages import is_upload
from lostreg.demo.methods import METHODS
from lostreg.demo.panels import draw_attention, draw_degrees, draw_objects, draw_taught
from lostreg.demo.session import MAX_OBJECTS, MAX_REGISTERS, DemoSettings, Models, Visitor
from lostreg.demo.words import box_json, box_table, hint, problem, verdict
from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.inference.options import Options
from lostreg.jsonio import whole_file
from lostreg.models.table import BackboneSpec
from lostreg.text import printable

_SHOWN_BY_BROWSERS: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_IDLE_SECONDS: Final = 1800  # after which a visitor's features are let go
_WAITING: Final = 20
_UNEXPECTED: Final = "Something unexpected happened; the log of the server says what."
_FEATURES: Final = [("keys (k)", "k"), ("queries (q)", "q"), ("values (v)", "v"), ("output (out)", "out")]


Made = TypeVar("Made")


def in_a_loop(make: Callable[[], Made]) -> Made:
    """What a function makes, while an event loop runs: where none does, Gradio makes one and leaves it open."""

    async def making() -> Made:
        return make()

    return asyncio.run(making())


class _PlainBlocks(gr.Blocks):
    """Says in one line what is wrong with a value that the page would never send."""

    async def preprocess_data(self, *arguments: Any, **options: Any) -> Any:
        """What the functions are called with."""
        try:
            return await super().preprocess_data(*arguments, **options)
        except Exception as error:
            message = str(error.message if isinstance(error, gr.Error) else error)
            reason = printable(message.partition("\n")[0])
            logging.getLogger(__name__).warning("a request was refused: %s", reason)
            told = reason if isinstance(error, gr.Error) else "These values cannot be used."
            raise gr.Error(told, print_exception=False) from None


class Page:
    """The page of one demo.

    Args:
        settings: of the demo.
        uploads: folder into which Gradio puts what visitors send; nothing else is read.
        models: loaded already; None loads the first backbone.
    """

    def __init__(self, settings: DemoSettings, uploads: Path, models: Models | None = None) -> None:
        self.settings = settings
        self.models = models or Models(settings)
        self._uploads = uploads.resolve()
        self.blocks = in_a_loop(self._make_blocks)

    def _make_blocks(self) -> gr.Blocks:
        with _PlainBlocks(
            title="lostreg demo", analytics_enabled=False, delete_cache=(600, 2 * _IDLE_SECONDS)
        ) as blocks:
            self._lay_out()
            self._connect()
        blocks.state_session_capacity = 40  # visitors whose features are kept
        made: gr.Blocks = blocks.queue(default_concurrency_limit=1, max_size=_WAITING)
        return made

    def _lay_out(self) -> None:
        self.visitor = gr.State(time_to_live=_IDLE_SECONDS)
        gr.HTML(f'<div id="intro"><h1>{TITLE}</h1>{INTRO}</div>', padding=False)
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="photo-side"):
                self.photo = gr.Image(
                    label="Photo",
                    sources=["upload", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    height=260,
                    buttons=[],
                    elem_id="photo",
                )
                with gr.Row(elem_id="examples", visible=bool(self.settings.examples)):
                    self.examples = [
                        gr.Button(path.stem.replace("_", " "), elem_id=f"example-{number}", min_width=60)
                        for number, path in enumerate(self.settings.examples)
                    ]
            with gr.Column(elem_id="answer-side"):
                self._lay_out_answer()
            with gr.Column(elem_id="options-side"):
                self._lay_out_options()

    def _lay_out_answer(self) -> None:
        self.told = gr.HTML(hint(START), elem_id="told", padding=False)
        self.picture = panel("The photo with boxes and masks", "picture")
        gr.HTML(caption(OBJECTS), padding=False)
        with gr.Row():
            with gr.Column(min_width=240, elem_classes="panel"):
                self.degrees = panel("Degree map", "degrees")
                self.degrees_told = gr.HTML(caption(METHODS[self.settings.method].caption), padding=False)
            with gr.Column(min_width=240, elem_classes="panel", visible=False) as self.taught_side:
                self.taught = panel("Map of what other photos taught", "taught")
                taught = self.settings.options.objectness
                gr.HTML(caption(TAUGHT.format(images=taught.facts.images) if taught else ""), padding=False)
            with gr.Column(min_width=240, elem_classes="panel"):
                self.attention = panel("Attention map", "attention")
                self.attention_told = gr.HTML(caption(ATTENTION), padding=False)
        self.table = gr.HTML(elem_id="boxes", padding=False)
        with gr.Accordion("The boxes as JSON, to copy", open=False):
            self.json = gr.Code(language="json", label="One line of a predictions file", interactive=False)

    def _lay_out_options(self) -> None:
        telling = METHODS[self.settings.method]
        self.method = gr.Dropdown(
            [(telling.label, name) for name, telling in METHODS.items()],
            value=self.settings.method,
            label="Method",
            info=telling.info,
            elem_id="method",
            filterable=False,
        )
        self.automatic = gr.Checkbox(
            True,
            label="Choose the bias",
            info="Tries a few; the clearest object is kept.",
            elem_id="automatic",
            interactive=telling.has_bias,
        )
        self.bias = gr.Slider(
            -1,
            1,
            value=0,
            step=0.01,
            label="Bias",
            info="Of LOST. Lower: fewer patches count as alike, and the object shrinks.",
            buttons=[],
            elem_id="bias",
            interactive=telling.has_bias,
        )
        self.objects = gr.Slider(
            1,
            MAX_OBJECTS,
            value=1,
            step=1,
            label="Objects, at most",
            buttons=[],
            elem_id="objects",
            interactive=telling.has_several,
        )
        self.masks = gr.Radio(
            [("patches", "patches"), ("refined on the pixels", "refined")],
            value="patches",
            label="Mask",
            elem_id="masks",
        )
        self.candidates = gr.Checkbox(
            False,
            label="Show candidates",
            info="Thin boxes: what else was considered.",
            elem_id="candidates",
            interactive=self.settings.method == "parts",
        )
        with gr.Accordion("Model", open=True):
            self._lay_out_model()

    def _lay_out_model(self) -> None:
        first = self.models.get(self.settings.backbones[0]).backbone
        self.backbone = gr.Dropdown(
            list(self.settings.backbones),
            value=first.spec.name,
            label="Backbone",
            info=self._about(first.spec),
            elem_id="backbone",
            filterable=False,
        )
        self.feature = gr.Dropdown(
            _FEATURES,
            value=first.spec.feature,
            label="Feature",
            info="What is compared between patches.",
            elem_id="feature",
            filterable=False,
        )
        self.layer = gr.Dropdown(
            _layers(first.depth),
            value=first.depth - 1,
            label="Layer",
            info="Where it is taken from.",
            elem_id="layer",
            filterable=False,
        )
        self.registers = gr.Dropdown(
            [("none", 0), *((str(count), count) for count in range(1, MAX_REGISTERS + 1))],
            value=self._registers_of(first.spec.name),
            label="Test-time registers",
            info="Blank tokens that take up what would make outliers.",
            visible=self.settings.has_registers(first.spec.name),
            elem_id="registers",
            filterable=False,
        )

    def _connect(self) -> None:
        choice = [self.backbone, self.feature, self.layer, self.registers]
        view = [self.method, self.automatic, self.bias, self.objects, self.masks, self.candidates]
        drawn = [self.picture, self.degrees, self.degrees_told, self.taught, self.taught_side]
        answer = [self.told, *drawn, self.table, self.json, self.bias]
        whole = [self.visitor, *answer, self.photo]
        attention = [self.attention, self.attention_told]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        model: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}

        def look_after(event: Any) -> None:
            """The forward, then the answer, then the attention."""
            shown = event.then(self.run, [self.visitor, *choice, *view], whole, show_progress_on=self.picture, **model)
            shown.then(self.attend, [self.visitor, *choice], attention, show_progress_on=self.attention, **model)

        look_after(self.photo.upload(self.receive, [self.photo, self.visitor], self.visitor, preprocess=False, **quiet))
        for path, button in zip(self.settings.examples, self.examples, strict=True):
            taking = partial(self.take_example, path)
            look_after(button.click(taking, self.visitor, [self.visitor, self.photo], **quiet))
        self.photo.clear(self.forget, self.visitor, [*whole, *attention], **quiet)
        look_after(
            self.backbone.input(
                self.choose_backbone,
                self.backbone,
                [self.backbone, self.feature, self.layer, self.registers, self.told],
                show_progress_on=self.picture,
                **model,
            )
        )
        changed = [self.feature.input, self.layer.input, self.registers.input]
        look_after(gr.on(changed, lambda: None, None, None, trigger_mode="always_last", **quiet))
        steady = {**model, "show_progress": "hidden", "trigger_mode": "always_last"}
        redrawn = [self.visitor, *answer]
        by_hand = [self.visitor, self.method, self.bias, self.objects, self.masks, self.candidates]
        self.bias.input(self.redraw_by_hand, by_hand, [*redrawn[:-1], self.automatic], **steady)
        controls = [self.method, self.automatic, self.bias, self.objects, self.candidates]
        chosen = self.method.input(self.choose_method, self.method, controls, **quiet)
        chosen.then(self.redraw, [self.visitor, *view], redrawn, show_progress_on=self.picture, **model)
        others = [self.automatic.input, self.objects.input, self.masks.input, self.candidates.input]
        gr.on(others, self.redraw, [self.visitor, *view], redrawn, **steady)

    def receive(self, file: Any, visitor: Visitor | None) -> Visitor:
        """Take note of an uploaded photo; it is read later.

        Args:
            file: as Gradio describes it.
            visitor: None at the first visit.
        """
        visitor = visitor or Visitor()
        path = str((file or {}).get("path") or "")
        if is_upload(path, self._uploads):
            visitor.take(Path(path), printable(Path(str(file.get("orig_name") or path)).name))
        else:
            visitor.take(None, "")
        return visitor

    def take_example(self, example: Path, visitor: Visitor | None) -> list[Any]:
        """Take one of the examples as the photo, out of a copy among the uploads: nothing else is given out."""
        visitor = visitor or Visitor()
        copy = self._uploads / "examples" / example.name
        if not copy.exists():  # uploads are let go after a while
            copy.parent.mkdir(exist_ok=True)
            with whole_file(copy) as beside:
                shutil.copyfile(example, beside)
        visitor.take(copy, example.name)
        return [visitor, str(copy)]

    def forget(self, visitor: Visitor | None) -> list[Any]:
        """The page as it was before the photo."""
        visitor = visitor or Visitor()
        visitor.take(None, "")
        return [visitor, *_nothing(hint(START)), gr.skip(), None, gr.skip()]

    def choose_backbone(
        self,
        backbone: str,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Load a backbone, and offer what it has."""
        try:
            progress(0.3, desc=f"Loading {backbone}")
            found = self.models.get(backbone).backbone
        except Exception as error:
            return [gr.update(info=""), *[gr.skip()] * 3, _explain(error)]
        depth = found.depth
        return [
            gr.update(info=self._about(found.spec)),
            found.spec.feature,
            gr.update(choices=_layers(depth), value=depth - 1),
            gr.update(visible=self.settings.has_registers(backbone), value=self._registers_of(backbone)),
            gr.skip(),
        ]

    def choose_method(self, method: str) -> list[Any]:
        """What is told of a method, and which controls it knows."""
        telling = METHODS.get(method)
        if telling is None:  # a list with nothing chosen
            return [gr.skip()] * 5
        usable = (telling.has_bias, telling.has_bias, telling.has_several, method == "parts")
        return [gr.update(info=telling.info), *(gr.update(interactive=is_usable) for is_usable in usable)]

    def run(
        self,
        visitor: Visitor | None,
        backbone: str,
        feature: Any,
        layer: int,
        registers: int,
        method: str,
        automatic: bool,
        bias: float,
        objects: int,
        masks: Any,
        candidates: bool,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Look at the photo with the chosen model and show what was found."""
        visitor = visitor or Visitor()
        if visitor.photo is None:
            return [visitor, *_nothing(hint(START)), gr.skip()]
        try:
            visitor.look(
                self.models,
                self._chosen(backbone, feature, layer, registers),
                lambda text: progress(0.3, desc=text),
            )
            answer = self._answer(visitor, method, automatic, bias, objects, masks, candidates)
        except Exception as error:
            unreadable = isinstance(error, ImageError)
            return [visitor, *_nothing(_explain(error, visitor)), None if unreadable else gr.skip()]
        return [visitor, *answer, self._preview(visitor)]

    def redraw(
        self,
        visitor: Visitor | None,
        method: str,
        automatic: bool,
        bias: float,
        objects: int,
        masks: Any,
        candidates: bool,
    ) -> list[Any]:
        """Run the method again on the same features: no forward, but for what the first DINO-seg reads beside them."""
        visitor = visitor or Visitor()
        if visitor.study is None:  # the last photo or model failed, and why is still being told
            return [visitor, *(gr.skip() for _ in _nothing(""))]
        try:
            return [visitor, *self._answer(visitor, method, automatic, bias, objects, masks, candidates)]
        except Exception as error:
            return [visitor, *_nothing(_explain(error, visitor))]

    def redraw_by_hand(
        self, visitor: Visitor | None, method: str, bias: float, objects: int, masks: Any, candidates: bool
    ) -> list[Any]:
        """The same with the bias of the slider: it is left where it is, and no bias is chosen any more."""
        return [*self.redraw(visitor, method, False, bias, objects, masks, candidates)[:-1], False]

    def attend(self, visitor: Visitor | None, backbone: str, feature: Any, layer: int, registers: int) -> list[Any]:
        """What the first token attends to, once the answer is shown."""
        if visitor is None or visitor.study is None or visitor.found is None:
            return [None, gr.skip()]
        try:
            found = visitor.attention(self.models, self._chosen(backbone, feature, layer, registers))
            drawn = draw_attention(visitor.study.picture.pixels, visitor.found, found.mean[0])
        except LostregError as error:
            return [None, caption(html.escape(_told(error, visitor)))]
        except Exception as error:
            _explain(error)
            return [None, caption(_UNEXPECTED)]
        share = 100 * float(found.mean[0].sum())
        text = (
            f"<b>Attention of {found.names[0]}</b> in the last layer, over its heads: bright is much. {share:.0f} % of "
        )
        return [drawn, caption(text + "it is on patches. For comparison: only DINO-seg uses it, of one head.")]

    def _answer(
        self,
        visitor: Visitor,
        method: str,
        automatic: bool,
        bias: float,
        objects: int,
        masks: Any,
        candidates: bool,
    ) -> list[Any]:
        if method not in METHODS:
            raise OptionError("expected a method")
        found = visitor.discover(
            max_objects=int(objects),
            method=method,
            bias=float(bias) if METHODS[method].has_bias and not automatic else "auto",
            refine=masks == "refined",
        )
        assert visitor.study is not None  # noqa: S101 - discover saw to it
        pixels, telling = visitor.study.picture.pixels, METHODS[method]
        return [
            verdict(found, int(objects), method),
            draw_objects(pixels, found, candidates=candidates),
            draw_degrees(pixels, found),
            caption(telling.caption),
            draw_taught(pixels, found),
            gr.update(visible=found.objectness is not None),
            box_table(found),
            box_json(visitor.name, found),
            round(found.bias, 2) if telling.has_bias else gr.skip(),
        ]

    def _preview(self, visitor: Visitor) -> Any:
        """The photo again where browsers cannot show the file that was sent, such as TIFF."""
        if visitor.study is None or Path(visitor.name).suffix.lower() in _SHOWN_BY_BROWSERS:
            return gr.skip()
        return visitor.study.picture.pixels

    def _chosen(self, backbone: str, feature: Any, layer: int | None, registers: int | None) -> Options:
        if layer is None or registers is None:  # a list with nothing chosen
            raise OptionError("expected a layer and a number of registers")
        has_registers = self.settings.has_registers(backbone)
        return self.settings.chosen(backbone, feature, int(layer), int(registers) if has_registers else 0)

    def _about(self, spec: BackboneSpec) -> str:
        misfit = self.models.misfit(spec.name)
        unused = f" What other photos taught is not used with it: {misfit}." if misfit else ""
        return f"The network that looks: {spec.training}.{unused}"

    def _registers_of(self, backbone: str) -> int:
        neurons = self.settings.neurons
        return min(neurons.count, MAX_REGISTERS) if neurons and self.settings.has_registers(backbone) else 0


def _layers(depth: int) -> list[tuple[str, int]]:
    return [(f"{layer} (last)" if layer == depth - 1 else str(layer), layer) for layer in reversed(range(depth))]


def _nothing(told: str) -> list[Any]:
    """No answer, only words."""
    return [told, None, None, gr.skip(), None, gr.update(visible=False), "", "", gr.skip()]


def _explain(error: Exception, visitor: Visitor | None = None) -> str:
    """A message for the visitor; what is no mistake of theirs goes to the server's log."""
    if not isinstance(error, LostregError):
        logging.getLogger(__name__).error("the demo could not answer", exc_info=error)
        return problem(_UNEXPECTED)
    return problem(_told(error, visitor))


def _told(error: LostregError, visitor: Visitor | None) -> str:
    """The message on one line, with no path of the server, but the name that the visitor knows."""
    message = str(error)
    if visitor and visitor.photo:
        message = message.replace(str(visitor.photo), visitor.name).replace(f"{visitor.photo.parent}{os.sep}", "")
    return printable(message)
