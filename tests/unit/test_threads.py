"""Neither exceptions nor hangs in threads harm the event loop, and every thread of the server is protected."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import contextvars
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from calotype_server import threads

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = Path(__file__).parents[2] / "service" / "calotype_server"
PATIENCE = 20.0
BRIEF = 0.02
"""A timeout that is meant to expire."""


class Panic(BaseException):
    """Stands for the panic of a Rust extension, which is not an `Exception`."""


HARMFUL = [
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    concurrent.futures.CancelledError(),
    StopIteration(1),
    StopAsyncIteration(),
    Panic("a panic"),
    BaseExceptionGroup("several", [SystemExit(3)]),
]


def fail(error: BaseException) -> None:
    """Raises `error`."""
    raise error


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """A lock that hangs until it is set; it is set at the end of the test, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("error", HARMFUL, ids=lambda error: type(error).__name__)
async def test_a_harmful_exception_becomes_an_ordinary_one(error: BaseException) -> None:
    """It becomes a `ThreadFailed` with the original as its cause, in an executor, a thread and a pool."""
    with ThreadPoolExecutor(1) as executor:
        work = threads.submit(executor, fail, error)
        assert await threads.completes(work, PATIENCE)
    pool = threads.Pool("test", 1)
    waiting = (asyncio.wrap_future(work), threads.run("test", fail, error), pool.run(PATIENCE, fail, error))
    failures = await asyncio.gather(*waiting, return_exceptions=True)
    pool.close()
    assert [type(each) for each in failures] == [threads.ThreadFailed] * 3
    assert all(each.__cause__ is error for each in failures)


async def test_an_ordinary_exception_stays_as_it_is() -> None:
    """Callers can handle the errors that a function documents."""
    with pytest.raises(ValueError, match="no"):
        await threads.run("test", fail, ValueError("no"))


async def test_a_thread_has_the_context_of_its_caller() -> None:
    """Log lines of the thread therefore carry the ids of the request."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("of the caller")
    pool = threads.Pool("test", 1)
    assert await threads.run("test", variable.get) == await pool.run(PATIENCE, variable.get) == "of the caller"
    pool.close()


def test_a_thread_that_ends_with_an_exception_is_logged() -> None:
    """A background thread never ends silently, not even with `SystemExit`."""
    with capture_logs() as logged:
        threads.start("test", lambda: fail(SystemExit(3))).join(PATIENCE)
    assert [(line["event"], line["thread"]) for line in logged] == [("a thread ended", "calotype-test")]


def test_the_process_exits_even_if_the_system_has_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit flushes standard output in a thread, but does not depend on it."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(threading.Thread, "start", lambda _: fail(RuntimeError("can't start new thread")))
    with pytest.raises(RuntimeError):
        threads.exit_process(70)
    assert codes == [70]


async def test_a_thread_that_hangs_is_replaced(gate: threading.Event) -> None:
    """The call fails, the next one has a thread, and the pool knows when the first one returns."""
    pool = threads.Pool("test", 1)
    with pytest.raises(threads.ThreadHangs):
        await pool.run(BRIEF, gate.wait)
    assert pool.hung == 1
    assert await pool.run(PATIENCE, lambda: 7) == 7
    gate.set()
    returned = [thread for thread in threading.enumerate() if thread.name.startswith("calotype-test")]
    pool.close()
    for thread in returned:
        await asyncio.to_thread(thread.join, PATIENCE)
    assert pool.hung == 0


async def test_lost_threads_are_bounded(gate: threading.Event) -> None:
    """When too many threads hang, calls fail at once; when these return, calls succeed again."""
    pool = threads.Pool("test", 2, max_hung=3)
    entered: list[None] = []

    def hang() -> None:
        entered.append(None)
        gate.wait()

    hung = await asyncio.gather(*(pool.run(BRIEF, hang) for _ in range(8)), return_exceptions=True)
    assert all(isinstance(each, threads.ThreadHangs) for each in hung)
    assert isinstance(hung[-1], threads.ThreadsExhausted)
    # Two run at once, so a fourth call may start before the third is counted.
    assert 3 <= len(entered) <= 4
    assert pool.is_exhausted
    lost = [thread for thread in threading.enumerate() if thread.name.startswith("calotype-test")]
    gate.set()
    for thread in lost:
        await asyncio.to_thread(thread.join, PATIENCE)
    assert await pool.run(PATIENCE, lambda: 7) == 7
    pool.close()


async def test_a_suspended_process_loses_only_a_part_of_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the clock jumps by an hour, a call of a minute does not fail."""
    loop, work, jump = asyncio.get_running_loop(), Future[None](), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + jump)
    waiting = asyncio.create_task(threads.completes(work, 60.0))
    for _ in range(3):
        await asyncio.sleep(0)
    jump = 3600.0
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    work.set_result(None)
    assert await waiting


def test_the_process_ends_without_joining_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output is flushed, closed streams do not matter, and the code is that of the caller."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(flush=lambda: fail(BrokenPipeError())))
    threads.exit_process(70)
    assert codes == [70]


def test_the_process_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """`exit_after` needs no event loop, and shows where threads hang."""
    ended = threading.Event()
    monkeypatch.setattr("os._exit", lambda _: ended.set())
    with capture_logs() as logged:
        threads.exit_after(0, 70)
        assert ended.wait(PATIENCE)
    assert [(line["event"], line["code"]) for line in logged] == [("the shutdown takes too long", 70)]


def test_every_thread_of_the_server_starts_in_one_module() -> None:
    """Code that starts a thread in another way would have to protect itself against exceptions of every class."""
    raw = {"run_in_executor", "to_thread", "Thread", "Timer", "run_sync", "start_new_thread", "submit"}
    protected = {"threads.submit", "self._queue.submit"}
    found = {
        f"{path.relative_to(SERVICE)}:{node.lineno} {ast.unparse(node.func)}"
        for path in SERVICE.rglob("*.py")
        if path.name != "threads.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and _name(node.func) in raw and ast.unparse(node.func) not in protected
    }
    assert found == set()


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
