"""What test-time registers are made of, and the file that keeps it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import PLAIN, SMALL, built
from timm.layers.mlp import Mlp
from torch import nn

from lostreg.errors import BackboneError, LostregError, OptionError, RegistersError
from lostreg.inference.discoverer import Discoverer
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.registers import FORMAT, RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")

FOUND = RegisterNeurons(
    neurons=((7, 1203), (5, 0), (7, 4)),
    count=2,
    backbone="dinov2_vits14",
    weights="hub — ü",
    cutoff=151.25,
    layer=7,
    images=128,
    outliers=0.0213,
    outliers_left=0.0001,
    seed=3,
)


@pytest.mark.parametrize("registers", [FOUND, RegisterNeurons(((0, 0),))], ids=["all", "least"])
def test_what_is_saved_is_loaded(registers: RegisterNeurons, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "registers.json"
    registers.save(path)
    loaded = RegisterNeurons.load(str(path))
    assert loaded == registers
    assert hash(loaded) == hash(registers)
    assert all(isinstance(pair, tuple) for pair in loaded.neurons)
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert fields["format"] == FORMAT
    assert next(iter(fields)) == "format"
    assert sorted(path.parent.iterdir()) == [path]


def fields(**changed: Any) -> dict[str, Any]:
    complete: dict[str, Any] = {
        "format": FORMAT,
        "neurons": [[1, 2], [0, 3]],
        "count": 1,
        "backbone": "",
        "weights": "",
        "cutoff": None,
        "layer": None,
        "images": 0,
        "outliers": 0.0,
        "outliers_left": 0,
        "seed": 0,
    }
    return {name: value for name, value in {**complete, **changed}.items() if value is not ...}


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps(fields(cutoff=12)))
    assert RegisterNeurons.load(path) == RegisterNeurons(((1, 2), (0, 3)), cutoff=12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no file of `lostreg registers find`"),
        ("{", "is no file of"),
        ("[" * 100_000, "is no file of"),
        ("[]", f'expected a JSON object with "format": "{FORMAT}"'),
        ("null", "expected a JSON object"),
        (json.dumps(fields(format=...)), "expected a JSON object with"),
        (json.dumps(fields(format="lostreg bias 1")), f'"format": "{FORMAT}"'),
        (json.dumps(fields(format="lostreg registers 2")), f'"format": "{FORMAT}"'),
        *[(json.dumps(fields(**{name: ...})), f"{name} missing") for name in list(fields())[1:]],
        (json.dumps(fields(count=..., seed=...)), "count, seed missing"),
        (json.dumps(fields(colour=1)), "colour"),
        (json.dumps(fields(count=0)), "count must be an integer of at least 1, not 0"),
        (json.dumps(fields(count=-1)), "count must be .*not -1"),
        (json.dumps(fields(neurons=[])), "neurons must be different pairs"),
        (json.dumps(fields(neurons=[[1, 2], [1, 2]])), "neurons must be different pairs"),
        (json.dumps(fields(neurons=[[-1, 2]])), "from 0"),
        (json.dumps(fields(neurons=[[1, -2]])), "from 0"),
        (json.dumps(fields(count="1")), "count is '1'"),
        (json.dumps(fields(count=1.0)), "count is 1.0"),
        (json.dumps(fields(count=True)), "count is True"),
        (json.dumps(fields(count=None)), "count is None"),
        (json.dumps(fields(backbone=3)), "backbone is 3"),
        (json.dumps(fields(weights=None)), "weights is None"),
        (json.dumps(fields(cutoff="150")), "cutoff is '150'"),
        (json.dumps(fields(cutoff=True)), "cutoff is True"),
        (json.dumps(fields(layer=1.5)), "layer is 1.5"),
        (json.dumps(fields(images=[])), r"images is \[\]"),
        (json.dumps(fields(outliers="")), "outliers is ''"),
        (json.dumps(fields(outliers_left={})), r"outliers_left is \{\}"),
        (json.dumps(fields(seed=None)), "seed is None"),
        *[
            (json.dumps(fields(neurons=neurons)), "neurons is no list of pairs of layer and unit")
            for neurons in (None, "1 2", {"1": 2}, [1, 2], [[1]], [[1, 2, 3]], [[1, 2.0]], [[1, "2"]], [[True, 2]])
        ],
    ],
)
def test_a_malformed_file_is_one_error_that_says_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "registers.json"
    path.write_text(content)
    with pytest.raises(RegistersError, match=message) as caught:
        RegisterNeurons.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, LostregError)


def test_bytes_that_are_no_text_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "registers.json"
    path.write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(RegistersError, match="is no file of `lostreg registers find`"):
        RegisterNeurons.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RegistersError, match=r"cannot read the registers file .*none\.json: No such file"):
        RegisterNeurons.load(tmp_path / "none.json")
    with pytest.raises(RegistersError, match="cannot read the registers file"):
        RegisterNeurons.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RegistersError, match="cannot write"):
        FOUND.save(tmp_path / "file" / "registers.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neurons": ((0, 1),), "count": 0}, "count must be an integer of at least 1, not 0"),
        ({"neurons": ()}, r"neurons must be different pairs of layer and unit, from 0, not \(\)"),
        ({"neurons": ((0, 1), (2, 3), (0, 1))}, "neurons must be different pairs"),
        ({"neurons": ((0, -1),)}, "from 0"),
        ({"neurons": ((-1, 0),)}, "from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RegisterNeurons(**options)


def test_neurons_by_layer_keep_their_order() -> None:
    assert FOUND.by_layer() == {7: [1203, 4], 5: [0]}
    assert FOUND.describe() == {"count": 2, "neurons": [[7, 1203], [5, 0], [7, 4]]}
    assert json.loads(json.dumps(FOUND.describe())) == FOUND.describe()


def test_neurons_belong_to_a_backbone_and_its_weights() -> None:
    FOUND.require("dinov2_vits14", FOUND.weights)
    with pytest.raises(OptionError, match="those of dinov2_vits14, not of dinov2_vitb14"):
        FOUND.require("dinov2_vitb14", FOUND.weights)
    with pytest.raises(OptionError, match="those of the weights hub — ü, not of file"):
        FOUND.require("dinov2_vits14", "file")
    RegisterNeurons(((0, 0),)).require("anything", "of any kind")


@pytest.fixture(scope="module")
def gated() -> Backbone:
    return built("dinov2_vitg14", depth=2, **SMALL)


def test_only_units_that_the_model_has_can_be_moved(gated: Backbone) -> None:
    width = gated.model.blocks[1].mlp.fc2.in_features  # type: ignore[index, union-attr]
    assert gated.hidden_units(1) == width
    assert gated.model.blocks[1].mlp.fc1.out_features == 2 * width  # type: ignore[index, union-attr]
    last = RegisterNeurons(((1, width - 1),))
    assert gated.with_registers(last).registers == last
    for pair in ((1, width), (2, 0), (10**9, 10**9)):
        message = f"dinov2_vitg14 has no hidden unit {pair[1]} in layer {pair[0]}"
        with pytest.raises(OptionError, match=message):
            gated.with_registers(RegisterNeurons(((0, 0), pair)))


def test_neurons_of_another_backbone_are_refused(gated: Backbone) -> None:
    for registers in (
        RegisterNeurons(((0, 0),), backbone="dinov2_vitl14"),
        RegisterNeurons(((0, 0),), backbone="dinov2_vitg14", weights="the hub's"),
    ):
        with pytest.raises(OptionError, match="the register neurons are those of"):
            gated.with_registers(registers)
        with pytest.raises(OptionError, match="the register neurons are those of"):
            Discoverer(gated, device="cpu", registers=registers)


class OtherMlp(nn.Module):
    """What no supported model has."""

    def __init__(self, width: int, has_second_projection: bool) -> None:
        super().__init__()
        name = "fc2" if has_second_projection else "other"
        self.add_module(name, nn.Linear(width, width))


@pytest.mark.parametrize("has_second_projection", [True, False])
def test_mlps_of_another_kind_are_refused(has_second_projection: bool) -> None:
    backbone = build_backbone(find_spec(PLAIN), depth=2)
    backbone.model.blocks[1].mlp = OtherMlp(192, has_second_projection)  # type: ignore[index, union-attr]
    backbone.with_registers(RegisterNeurons(((0, 0),)))
    with pytest.raises(BackboneError, match="cannot read the hidden units of a OtherMlp"):
        backbone.with_registers(RegisterNeurons(((1, 0),)))


def test_an_mlp_with_a_forward_of_its_own_is_not_taken_for_timm_s() -> None:
    class Doubled(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    backbone = build_backbone(find_spec(PLAIN), depth=1)
    backbone.model.blocks[0].mlp = Doubled(192)  # type: ignore[index, union-attr]
    with pytest.raises(BackboneError, match="cannot read the hidden units of a Doubled"):
        backbone.with_registers(RegisterNeurons(((0, 0),)))


def test_a_discoverer_records_its_registers(gated: Backbone) -> None:
    registers = RegisterNeurons(((1, 2), (0, 3)), 2)
    discoverer = Discoverer(gated, device="cpu", registers=registers)
    assert discoverer.options.record()["test_time_registers"] == {"count": 2, "neurons": [[1, 2], [0, 3]]}
    without = discoverer.with_registers(None)
    assert without.options == Discoverer(gated, device="cpu").options
    assert discoverer.backbone.registers == registers
    assert without.with_registers(registers).options == discoverer.options
    assert gated.registers is None
    assert without.backbone.model is discoverer.backbone.model is gated.model
