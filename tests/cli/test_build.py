"""Parsed options become objects: an option is a field of `Options`, and a flag of the same name."""

import dataclasses

import pytest

from lostreg.cli.build import options_of
from lostreg.cli.main import build_parser
from lostreg.errors import OptionError
from lostreg.inference.options import Options

DECIDED = {
    "backbone",
    "exif",
    "registers",
    "objectness",
    "score",
}  # named elsewhere, by the command, and found in images or a file; a function, which only Python has
COMMANDS = {
    "predict": ["photo.jpg"],
    "discover": ["photos", "--out", "out"],
    "eval": ["voc", "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_flag_with_the_same_default(command: str) -> None:
    given = options_of(build_parser().parse_args([command, *COMMANDS[command]]))
    expected = {field.name: field.default for field in dataclasses.fields(Options) if field.name not in DECIDED}
    if command == "eval":  # whose boxes were measured at the images' own size
        expected["max_side"] = None
    if command == "discover":  # for people who want boxes, not figures to compare
        expected["precision"] = "auto"
        expected["method"] = None  # parts, or what a run was begun with
    assert given == expected


def test_what_is_given_arrives() -> None:
    line = "predict photo.jpg --feature v --bias=-0.3 --masks refined --box-from mask --max-objects 4 --batch-size 2"
    options = Options(**options_of(build_parser().parse_args(line.split())))
    assert (options.feature, options.bias, options.refine, options.box_from) == ("v", -0.3, True, "mask")
    assert (options.max_objects, options.batch_size) == (4, 2)


def test_boxes_from_masks_that_are_not_asked_for_are_refused() -> None:
    with pytest.raises(OptionError, match="add --masks refined"):
        options_of(build_parser().parse_args(["predict", "photo.jpg", "--box-from", "mask"]))
