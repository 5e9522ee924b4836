"""What a demo leaves behind once it has ended."""

import asyncio
import gc
import warnings

import pytest

pytest.importorskip("gradio")

from serving import served

pytestmark = pytest.mark.usefixtures("one_thread")


def test_no_event_loop_stays_open() -> None:
    gc.collect()
    before = {id(one) for one in gc.get_objects() if issubclass(type(one), asyncio.AbstractEventLoop)}
    with served():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        left = [
            one
            for one in gc.get_objects()
            if issubclass(type(one), asyncio.AbstractEventLoop) and id(one) not in before and not one.is_closed()
        ]
    assert left == []
