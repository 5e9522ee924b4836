"""Products in float32: under every way in which PyTorch can be told otherwise, and those settings afterwards."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from lostreg.artifacts.gram import view_gram
from lostreg.methods.exact import exact_float32
from lostreg.methods.lost import lost_boxes

CPU = torch.device("cpu")
NEW = hasattr(torch.backends.mkldnn, "matmul")  # the names since PyTorch 2.9
LEVELS = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul")] * NEW

Setting = Callable[[], object]


def new(backend: str, operation: str, precision: str) -> Setting:
    return lambda: torch._C._set_fp32_precision_setter(backend, operation, precision)


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def public() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


OLD_SETTINGS: dict[str, list[Setting]] = {
    "untouched": [],
    "highest": [lambda: torch.set_float32_matmul_precision("highest")],
    "high": [lambda: torch.set_float32_matmul_precision("high")],
    "medium": [lambda: torch.set_float32_matmul_precision("medium")],
    "allow_tf32": [allow_tf32],
    "medium, then allow_tf32": [lambda: torch.set_float32_matmul_precision("medium"), allow_tf32],
}
NEW_SETTINGS: dict[str, list[Setting]] = {
    "torch.backends": [public],
    "all tf32": [new("generic", "all", "tf32")],
    "all bf16": [new("generic", "all", "bf16")],
    "cuda tf32": [new("cuda", "all", "tf32")],
    "mkldnn bf16": [new("mkldnn", "all", "bf16")],
    "products of cuda tf32": [new("cuda", "matmul", "tf32")],
    "products of mkldnn tf32": [new("mkldnn", "matmul", "tf32")],
    "products of mkldnn bf16": [new("mkldnn", "matmul", "bf16")],
    "inherited and its own": [new("generic", "all", "bf16"), new("mkldnn", "matmul", "bf16")],
    "every level another": [new("generic", "all", "bf16"), new("cuda", "all", "tf32"), new("mkldnn", "all", "ieee")],
    "old and new": [lambda: torch.set_float32_matmul_precision("high"), new("mkldnn", "matmul", "bf16")],
    "new against old": [lambda: torch.set_float32_matmul_precision("medium"), new("cuda", "matmul", "ieee")],
    "old over inherited": [new("generic", "all", "bf16"), allow_tf32],
}
SETTINGS = OLD_SETTINGS | (NEW_SETTINGS if NEW else {})
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def nothing_set() -> Iterator[None]:
    """As in a new process, before and afterwards."""
    reset()
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    for level in LEVELS:
        new(*level, "none")()


def told() -> dict[object, Any]:
    """What every getter that works tells."""
    getters: dict[object, Callable[[], Any]] = {
        "precision": torch.get_float32_matmul_precision,
        "allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    }
    for level in LEVELS:
        getters[level] = lambda level=level: torch._C._get_fp32_precision_getter(*level)
    seen = {}
    for name, getter in getters.items():
        try:
            seen[name] = getter()
        except RuntimeError:  # old names and new ones contradict each other
            assert NEW
    return seen


def own() -> dict[object, Any]:
    """What is set at each level itself, found by taking away what could be inherited; and the old name's."""
    seen: dict[object, Any] = {}
    for level in LEVELS:
        seen[level] = torch._C._get_fp32_precision_getter(*level)
        new(*level, "none")()
    return seen | {"precision": torch.get_float32_matmul_precision()}


def is_exact() -> bool:
    """Whether products are taken in float32, and whether no getter has anything against that."""
    seen = told()
    assert (seen["precision"], seen["allow_tf32"]) == ("highest", False)
    return not NEW or all(seen[backend, "matmul"] in ("ieee", "none") for backend in ("cuda", "mkldnn"))


@every_setting
def test_products_are_exact_within_and_every_getter_tells_the_same_afterwards(settings: list[Setting]) -> None:
    for setting in settings:
        setting()
    before = told()
    for _ in range(2):
        with exact_float32(CPU):
            assert is_exact()
        assert told() == before


@every_setting
def test_what_was_inherited_is_inherited_afterwards(settings: list[Setting]) -> None:
    for setting in settings:
        setting()
    before = own()
    reset()
    for setting in settings:
        setting()
    with exact_float32(CPU):
        pass
    assert own() == before


@every_setting
def test_an_error_within_leaves_no_trace(settings: list[Setting]) -> None:
    for setting in settings:
        setting()
    before = told()
    with pytest.raises(ZeroDivisionError), exact_float32(CPU):
        _ = 1 / 0
    assert told() == before


@every_setting
def test_lost_and_the_gram_views_do_not_depend_on_the_setting(settings: list[Setting]) -> None:
    features = torch.randn(400, 96) + 0.1
    outliers = np.arange(400) % 7 == 0
    plain = lost_boxes(features[None], (20, 20), "auto")
    view = view_gram(features, (20, 20), outliers, "auto", 100, normalize=True)
    for setting in settings:
        setting()
    result = lost_boxes(features[None], (20, 20), "auto")
    assert torch.equal(result.bias, plain.bias)
    assert torch.equal(result.scores, plain.scores)
    assert torch.equal(result.degrees, plain.degrees)
    again = view_gram(features, (20, 20), outliers, "auto", 100, normalize=True)
    assert (again.every, again.normal) == (view.every, view.normal)


def test_every_product_of_lost_and_of_the_gram_views_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, bool]] = set()

    def spy_on(name: str, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def spy(*tensors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            seen.add((name, is_exact()))
            return product(*tensors, **options)

        return spy

    torch.set_float32_matmul_precision("medium")
    features = torch.randn(2, 100, 32)
    for owner, name in ((torch, "mm"), (torch, "bmm"), (torch.Tensor, "__matmul__")):
        monkeypatch.setattr(owner, name, spy_on(name, getattr(owner, name)))
    for batch in (features[:1], features):
        lost_boxes(batch, (10, 10), "auto")
    assert seen == {("mm", True), ("bmm", True), ("__matmul__", True)}
    seen.clear()
    view_gram(features[0], (10, 10), np.arange(100) < 9, "auto", 100, normalize=True)
    assert seen == {("mm", True), ("__matmul__", True)}


@pytest.mark.parametrize("first_out", [0, 1])
def test_the_last_of_two_threads_to_leave_restores_the_setting(first_out: int) -> None:
    torch.set_float32_matmul_precision("medium")
    before = told()
    leave = [threading.Event(), threading.Event()]
    inside = threading.Barrier(3)

    def use(number: int) -> None:
        with exact_float32(CPU):
            inside.wait(10)
            leave[number].wait(10)

    threads = [threading.Thread(target=use, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert is_exact()
    for number in (first_out, 1 - first_out):
        assert is_exact()
        leave[number].set()
        threads[number].join(10)
    assert told() == before


def test_any_number_of_threads_find_it_exact_and_leave_it_as_it_was() -> None:
    torch.set_float32_matmul_precision("high")
    before = told()

    def use(_: int) -> bool:
        with exact_float32(CPU), exact_float32(CPU):
            return is_exact()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(500)))
    assert told() == before


def test_what_is_exact_already_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("set")

    with monkeypatch.context() as patch:  # undone before `reset` sets them
        patch.setattr("lostreg.methods.exact._set_precision", fail)
        patch.setattr(torch, "set_float32_matmul_precision", fail)
        with exact_float32(CPU):
            pass


def test_autocast_is_off_within() -> None:
    with torch.autocast("cpu", torch.bfloat16), exact_float32(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
