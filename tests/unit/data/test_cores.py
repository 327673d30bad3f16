from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_chord.data import cores
from megatron_chord.data.cores import on_all_cores
from megatron_chord.data.rendering import Renderer
from megatron_chord.records import Compact


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "ALONE_S", 0.0)


def late(item: int) -> int:
    if item % 7 == 0:
        time.sleep(0.01)
    if item % 10 == 5:
        raise ValueError(f"work {item}")
    return item * item


def prepared(item: int) -> tuple[str, int | Exception]:
    return f"item {item}", KeyError(item) if item % 10 == 3 else item


@pytest.mark.parametrize("count", [1, 3])
def test_results_and_exceptions_come_in_order(count: int) -> None:
    found: list[object] = []
    for name, result in on_all_cores(range(40), prepared, late, cores=count):
        try:
            found.append((name, result()))
        except (KeyError, ValueError) as error:
            found.append((name, str(error)))
    expected = [
        (f"item {i}", str(KeyError(i)) if i % 10 == 3 else f"work {i}" if i % 10 == 5 else i * i)
        for i in range(40)
    ]
    assert found == expected


def test_several_threads_work_and_items_are_read_only_a_little_ahead() -> None:
    read = 0
    together = threading.Barrier(3, timeout=20)

    def items() -> Iterator[int]:
        nonlocal read
        for item in range(300):
            read = item
            yield item

    def work(item: int) -> int:
        if 2 <= item < 5:
            together.wait()  # this line passes only when three threads have come
        return item

    results = on_all_cores(items(), lambda item: (str(item), item), work, cores=3)
    for done, (_, result) in enumerate(results):
        assert result() == done
        assert read <= done + 12


def test_one_renderer_renders_in_several_processes_at_once() -> None:
    renderer = Renderer("{{ messages[0].content }}!", {}, "test")
    texts = [f"text {i}" for i in range(20)]
    render = lambda text: renderer.render([{"role": "user", "content": text}], add_generation_prompt=False)  # noqa: E731
    found = [result() for _, result in on_all_cores(texts, lambda text: (text, text), render, cores=2)]
    assert found == [f"{text}!" for text in texts]
    renderer.stop_processes()
    assert render("again") == "again!"
    renderer.stop_processes()


def test_a_compact_tuple_behaves_like_a_tuple() -> None:
    numbers = (7, 0, 151_936, 3)
    compact = Compact(numbers, np.int32)
    assert compact == numbers
    assert numbers == compact
    assert compact == Compact(np.array(numbers, np.int32), np.int32)
    assert compact != (7, 0, 151_936)
    assert {compact: 1}[numbers] == 1  # type: ignore[index]
    assert (compact[1:3], compact[-1], list(compact), len(compact)) == ((0, 151_936), 3, list(numbers), 4)
    assert type(compact[0]) is int
    assert compact.index(3) == 3
    marks = Compact((False, True, True), np.bool_)
    assert marks.count(True) == 2
    assert marks[::-1] == (True, True, False)
    assert marks[0] is False
    assert np.asarray(marks, np.bool_).tobytes() == bytes((False, True, True))
    assert np.array(compact, np.int64).dtype == np.int64
