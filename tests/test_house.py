"""The direction of imports: each package stands above all that it imports, and nothing runs back up."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# From the top down. What stands on one line may use each other one way.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("gallery",),
    ("exports",),
    ("training",),
    ("runs",),
    ("probing",),
    ("artifacts",),
    ("inference",),
    ("models",),
    ("methods",),
    ("datasets", "metrics"),
    ("images", "jsonio"),
    ("kernels",),
    ("checks", "errors", "defaults", "progress", "templates", "text"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@pytest.fixture(scope="session")
def sources(repository: Path) -> dict[str, str]:
    """The text of every module by its dotted name, the package's face left out: it hands names on."""
    paths = sorted((repository / "lostreg").rglob("*.py"))
    found = {}
    for path in paths:
        parts = path.relative_to(repository).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    del found["lostreg"]
    return found


def imports(text: str, modules: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Line and module of every import of lostreg's, wherever in a module it stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("lostreg"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lostreg":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if whole in modules else str(node.module)


def arrows_up(modules: dict[str, str]) -> list[str]:
    """What runs against the floors, in words."""
    told = []
    for name, text in modules.items():
        mine = name.split(".")[1]
        for line, target in imports(text, modules):
            room = target.partition(".")[2].split(".")[0]
            if room not in FLOOR or FLOOR[room] < FLOOR[mine]:
                told.append(f"{name}, line {line}: imports {target}, which stands above {mine}")
    return told


def test_every_room_has_a_floor(sources: dict[str, str]) -> None:
    assert {name.split(".")[1] for name in sources} <= FLOOR.keys()


def test_no_import_goes_up(sources: dict[str, str]) -> None:
    assert arrows_up(sources) == []


def test_no_modules_import_each_other_in_a_circle(sources: dict[str, str]) -> None:
    graph = {name: {target for _, target in imports(text, sources)} - {name} for name, text in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "text",
    [
        "from lostreg.cli.main import main",
        "import lostreg.runs.folder",
        "def late():\n    from lostreg import inference",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lostreg.models.backbone import Backbone",
        "from lostreg import Discoverer",
    ],
)
def test_an_import_that_goes_up_is_seen_wherever_it_stands(sources: dict[str, str], text: str) -> None:
    made = {**sources, "lostreg.methods.lost": text, "lostreg.methods.bias": "from lostreg.images.boxes import cells"}
    (told,) = [line for line in arrows_up(made) if "lostreg.methods" in line.partition(":")[0]]
    assert told.startswith("lostreg.methods.lost, line ")


def test_methods_and_metrics_know_nothing_of_files(sources: dict[str, str]) -> None:
    for name, text in sources.items():
        if name.startswith(("lostreg.methods", "lostreg.metrics")):
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
            named = {alias.name for node in nodes for alias in node.names} | {
                node.module for node in nodes if isinstance(node, ast.ImportFrom)
            }
            assert named.isdisjoint({"pathlib", "os", "json"}), name


@pytest.mark.parametrize(
    "name", ["lostreg.models", "lostreg.images", "lostreg.runs", "lostreg.methods", "lostreg.training"]
)
def test_a_package_that_is_a_folder_alone_runs_nothing(sources: dict[str, str], name: str) -> None:
    assert sources[name] == ""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lostreg.cli.main", ("torch", "cv2", "matplotlib", "sklearn", "jinja2", "gradio", "importlib.metadata")),
        ("lostreg.cli.build", ("torch",)),
        ("lostreg.cli.options", ("torch",)),
        ("lostreg.models.table", ("torch", "numpy")),
        ("lostreg.errors", ("torch", "numpy")),
        ("lostreg.defaults", ("torch", "numpy")),
        ("lostreg.images.allocator", ("torch", "numpy")),
        ("lostreg.artifacts", ("torch", "matplotlib", "sklearn")),
        ("lostreg.inference.discoverer", ("matplotlib", "sklearn", "jinja2", "scipy")),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(module: str, absent: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
