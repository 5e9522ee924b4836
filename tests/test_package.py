"""The wheel: what is in it, and that it runs away from the checkout."""

import ast
import os
import pydoc
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

import lostreg


@pytest.fixture(scope="module")
def files(repository: Path) -> list[str]:
    """What git knows, and what is new and not ignored."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=repository, capture_output=True)
    return [name for name in listed.stdout.decode().splitlines() if (repository / name).is_file()]


def copied(names: Iterable[str], repository: Path, target: Path) -> Path:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((repository / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, repository: Path, files: list[str]) -> Path:
    """A folder ``lostreg`` with the files of the package, so that nothing else can help."""
    needed = [name for name in files if name.split("/")[0] in ("lostreg", "pyproject.toml", "README.md", "LICENSE")]
    return copied(needed, repository, tmp_path_factory.mktemp("parent") / "lostreg")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, clone: Path) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(clone)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_alone(wheel: Path, repository: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lostreg", f"lostreg-{lostreg.__version__}.dist-info"}
    assert {"lostreg/py.typed", "lostreg/datasets/coco_20k.txt", "lostreg/cli/main.py"} <= set(names)
    recipes = (repository / "lostreg" / "recipes").iterdir()
    assert {f"lostreg/recipes/{path.name}" for path in recipes} <= set(names)
    assert {f"lostreg/gallery/{name}" for name in ("page.html", "gallery.css", "gallery.js")} <= set(names)


def test_the_source_archive_is_the_repository(files: list[str], repository: Path, tmp_path: Path) -> None:
    visible = [name for name in files if not name.startswith(".")]
    source = copied(visible, repository, tmp_path / "lostreg")
    (source / "datasets" / "voc").mkdir()
    (source / "datasets" / "voc" / "fetched.jpg").touch()
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(visible) <= names
    assert "datasets/voc/fetched.jpg" not in names


@pytest.mark.parametrize("installed", ["wheel", "editable"])
def test_the_sample_runs_outside_the_checkout(wheel: Path, installed: str, tmp_path: Path, repository: Path) -> None:
    environment = dict(os.environ)
    script = Path(sys.executable).with_name("lostreg")
    if installed == "wheel":
        site = tmp_path / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
        script = site / "bin" / "lostreg"
        environment["PYTHONPATH"] = str(site)
    arguments = ["eval", "sample", "--root", str(repository / "datasets" / "sample"), "--out", "out"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--backbone", "imgfocus_vits14"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("corloc ")
    assert last.endswith("/6)")
    code = "import lostreg; print(lostreg.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path if installed == "wheel" else repository)


def test_an_editable_install_wins_over_the_clone_beside_a_script(clone: Path, tmp_path: Path) -> None:
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(built).extractall(tmp_path)
    code = f"import site; site.addsitedir({str(tmp_path)!r}); import lostreg; print(lostreg.__file__)"
    alone = [sys.executable, "-S", "-c", code]  # without what is installed here
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(alone, cwd=clone.parent, env=environment, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == clone / "lostreg" / "__init__.py"


def test_importing_lostreg_loads_no_model_library() -> None:
    code = "import lostreg, sys; print([name for name in ('torch', 'timm', 'cv2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in lostreg.__all__:
        assert getattr(lostreg, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        lostreg.nonsense  # noqa: B018


def test_dir_and_help_list_every_public_name_once_and_in_its_group() -> None:
    assert len(set(lostreg.__all__)) == len(lostreg.__all__)
    assert {name for name in dir(lostreg) if not name.startswith("_")} == {*lostreg.__all__, "errors"}
    listed = [line.split()[0] for line in str(lostreg.__doc__).splitlines() if line.startswith("    ")]
    assert listed == lostreg.__all__
    assert {"Calibration", "calibrate", "Discoverer", "lost_boxes", "corloc", "read_predictions"} <= set(listed)
    assert "Metrics:\n    corloc " in pydoc.plain(pydoc.render_doc(lostreg)).replace("    Metrics:\n    ", "Metrics:\n")


def test_type_checkers_are_told_of_every_public_name() -> None:
    tree = ast.parse(Path(str(lostreg.__file__)).read_text(encoding="utf-8"))
    block, _ = [node for node in tree.body if isinstance(node, ast.If)]
    told = [alias for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(alias.name for alias in told) == sorted(lostreg.__all__)
    assert all(alias.asname == alias.name for alias in told)  # else mypy takes them for private


@pytest.mark.parametrize("package", [lostreg, lostreg.artifacts])
def test_type_checkers_are_told_of_no_other_name(package: ModuleType) -> None:
    """For them any name is there where a module has a `__getattr__`."""
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    hidden = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "not TYPE_CHECKING"]
    seen = [node for node in tree.body if node not in hidden]
    assert hidden
    assert not any(getattr(node, "name", None) == "__getattr__" for part in seen for node in ast.walk(part))


def test_the_version_is_said_once() -> None:
    from importlib.metadata import version

    assert version("lostreg") == lostreg.__version__
