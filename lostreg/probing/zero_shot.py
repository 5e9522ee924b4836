"""Zero-shot classification: a class is what the text tower of a CLIP backbone makes of its name.

As in table 2b of "Vision Transformers Need Registers" (Darcet et al., ICLR 2024). Texts are open_clip's: the tower, its
tokenizer and the prompts. Images go through the backbone, so that its registers and its weights count.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from timm.data.imagenet_info import ImageNetInfo

from lostreg.errors import BackboneError, OptionError
from lostreg.methods.exact import exact_float32
from lostreg.models.backbone import Backbone
from lostreg.models.checkpoints import why_out_of_reach
from lostreg.models.table import BACKBONES, BackboneSpec
from lostreg.probing.heads import Head
from lostreg.progress import OnProgress, telling

# Names under which open_clip looks for a model's weights.
_FILES: Final = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def require_text_tower(spec: BackboneSpec) -> tuple[str, str]:
    """open_clip's names of the model and of the weights that hold a backbone's text tower.

    Raises:
        BackboneError: if the backbone has none.
        OptionError: if open_clip is not installed.
    """
    if spec.text_tower is None:
        names = ", ".join(row.name for row in BACKBONES.values() if row.text_tower)
        raise BackboneError(f"zero-shot needs a backbone with a text tower: expected one of {names}, not {spec.name}")
    try:
        import open_clip  # noqa: F401
    except ImportError as error:
        raise OptionError(f'zero-shot needs open_clip: pip install "lostreg[clip]" ({error})') from error
    return spec.text_tower


def text_head(backbone: Backbone, classes: Sequence[str], on_progress: OnProgress) -> Head:
    """The classes' texts as a linear head on the last CLS token.

    A class is the mean of its prompts' embeddings, which have norm 1 before and after. An image's class is the one with
    the highest cosine to CLS P, where P is the projection of open_clip's image tower; the norm of CLS P, which is the
    same for all classes, is left out.

    Args:
        backbone: whose weights are those of its row, or were trained from them with the text tower's space kept.
        classes: names, with underscores or spaces; WordNet ids of ImageNet stand for open_clip's names.
        on_progress: called after each class.

    Raises:
        BackboneError: if the backbone has no text tower, or it cannot be had.
        OptionError: if open_clip is not installed.
    """
    name, tag = require_text_tower(backbone.spec)
    import open_clip

    device = backbone.device
    with _logging_unchanged():
        model = _load(backbone.spec.name, name, tag)
        tokenizer = open_clip.get_tokenizer(name)
    projection = model.visual.proj.detach().to(device)
    del model.visual
    model.to(device).eval()
    texts = []
    with exact_float32(device):
        for text in telling(class_names(classes), len(classes), on_progress, "texts"):
            prompts = open_clip.OPENAI_IMAGENET_TEMPLATES
            texts.append(open_clip.build_zero_shot_classifier(model, tokenizer, [text], prompts, device=device))
        weight = projection @ torch.cat(texts, dim=1)  # (D, E) (E, C)
    dimensions, count = weight.shape
    zeros, ones = torch.zeros(dimensions, device=device), torch.ones(dimensions, device=device)
    return Head(weight, torch.zeros(count, device=device), mean=zeros, scale=ones, penalty=0.0)


def class_names(folders: Sequence[str]) -> list[str]:
    """What prompts call the classes: the folder's name, or ImageNet's where it is one of its WordNet ids."""
    from open_clip import IMAGENET_CLASSNAMES

    imagenet: Any = ImageNetInfo()
    names = dict(zip(imagenet.label_names(), IMAGENET_CLASSNAMES, strict=True))
    return [names.get(folder, folder.replace("_", " ")) for folder in folders]


def _load(backbone: str, name: str, tag: str) -> Any:
    import open_clip

    needed = f"the text tower of {backbone}, open_clip's {name} ({tag})"
    hub_id = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")
    reason = why_out_of_reach(hub_id, _FILES)
    try:
        if reason is None:
            return open_clip.create_model(name, pretrained=tag, precision="fp32")
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
    raise BackboneError(
        f"{needed}, could not be fetched from the hub ({reason}): go online once, set HF_ENDPOINT to a mirror, or "
        f"copy {hub_id} into the hub's cache"
    )


@contextmanager
def _logging_unchanged() -> Iterator[None]:
    """open_clip logs through the root logger, which would set up logging for the whole process."""
    silent = logging.NullHandler()
    logging.root.addHandler(silent)
    try:
        yield
    finally:
        logging.root.removeHandler(silent)
