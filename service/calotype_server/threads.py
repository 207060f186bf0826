"""Runs functions in threads, so that neither an exception nor a hang in a thread harms the rest of the process.

Every thread of the server starts here. An exception that is not an `Exception`, such as `SystemExit` in a library or a
panic in a Rust extension, ends an event loop or is lost in it. So it becomes a `ThreadFailed` in the thread itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import sys
import threading
import time
import traceback
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "LAST_RESORT",
    "Pool",
    "ThreadFailed",
    "ThreadHangs",
    "ThreadsExhausted",
    "completes",
    "contained",
    "done",
    "exit_after",
    "exit_process",
    "run",
    "short_turns",
    "stacks",
    "start",
    "submit",
]

_log = structlog.get_logger(__name__)

_PREFIX = "calotype-"
LAST_RESORT = f"{_PREFIX}last-resort"
"""Name of the thread of `exit_after`."""

_SLICES = 10
"""A timeout is waited for in this many parts. A process that was suspended then loses one part, not the whole time."""

_MAX_HUNG = 8
_FLUSH_SECONDS = 1.0

_TURN_SECONDS = 0.0005
"""Longest time that a thread keeps Python's lock while another waits for it; Python's default is 5 ms.

A denoiser gives up the lock at each of its thousands of torch calls, and then waits for a busy thread. Measured with
3,000 small torch calls (24 ms) beside a thread that is busy for 2 ms every 10 ms: the calls waited 1.1 ms with the
default, and 0.7 ms with this value; the other thread waited less than 0.1 ms. Busy periods of 0.3 ms, as for one
message, made no difference."""

T = TypeVar("T")
P = ParamSpec("P")


class ThreadFailed(Exception):
    """A function raised an exception that must not leave its thread. The cause is that exception."""


class ThreadHangs(Exception):
    """A function did not return in time. Its thread still works on it."""


class ThreadsExhausted(ThreadHangs):
    """A function was not called, because too many threads hang."""


def contained(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function`.

    Raises:
        Exception: An exception of the function.
        ThreadFailed: The function raised an exception that is not an `Exception`, or one with a meaning for the event
            loop.
    """
    try:
        return function(*args, **kwargs)
    except (StopIteration, StopAsyncIteration, CancelledError) as error:
        # A future cannot hold the first; the others would end the coroutine that waits.
        raise ThreadFailed(type(error).__name__) from error
    except Exception:
        raise
    except BaseException as error:
        raise ThreadFailed(type(error).__name__) from error


def start(name: str, function: Callable[[], object]) -> threading.Thread:
    """Runs `function` in a new daemon thread, which does not delay the exit of the process. Logs its exceptions."""

    def target() -> None:
        try:
            contained(function)
        except Exception:
            _log.exception("a thread ended", thread=_PREFIX + name)

    thread = threading.Thread(target=target, name=_PREFIX + name, daemon=True)
    thread.start()
    return thread


def submit(executor: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Runs `function` in an executor, in the caller's context so that its log lines carry the caller's ids."""
    return executor.submit(contextvars.copy_context().run, lambda: contained(function, *args, **kwargs))


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Makes threads take shorter turns in Python during the block, so that none delays the denoiser for long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def run(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns the result of `function`, which runs in a new daemon thread and in the caller's context.

    A cancelled caller leaves the thread behind; its result is then ignored.

    Raises:
        Exception: As for `contained`.
    """
    work: Future[T] = Future()
    context = contextvars.copy_context()

    def target() -> None:
        try:
            result = context.run(lambda: contained(function, *args, **kwargs))
        except Exception as error:
            work.set_exception(error)
        else:
            work.set_result(result)

    start(name, target)
    await asyncio.wait({done(work)})
    return work.result()


def exit_process(code: int) -> None:
    """Ends the process without waiting for any thread.

    It flushes standard output and error before, for at most a second: the reader of a pipe may hang.
    """

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or a pipe without a reader
                stream.flush()

    try:
        start("flush", flush).join(_FLUSH_SECONDS)
    finally:
        # Even if the system has no more threads.
        os._exit(code)


def exit_after(seconds: float, code: int) -> None:
    """Ends the process with exit code `code` after `seconds` if it still runs, even if the event loop hangs."""

    def end() -> None:
        time.sleep(seconds)
        try:
            report = start("last-words", lambda: _log.error("the shutdown takes too long", code=code, stacks=stacks()))
            report.join(_FLUSH_SECONDS)
        finally:
            exit_process(code)

    start(LAST_RESORT.removeprefix(_PREFIX), end)


def done(work: Future[T]) -> asyncio.Future[None]:
    """Returns a future of the event loop that is done when `work` is done. It has no result and no exception."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not future.done():
            future.set_result(None)

    def wake(_: Future[T]) -> None:
        with contextlib.suppress(RuntimeError):  # The event loop is closed: the process is ending.
            loop.call_soon_threadsafe(settle)

    work.add_done_callback(wake)
    return future


async def completes(work: Future[T], seconds: float | None) -> bool:
    """Waits for a thread's work; returns whether it is done after `seconds`. None waits without a limit.

    Time during which the whole process was suspended does not count.
    """
    waiting = done(work)
    for _ in range(_SLICES):
        await asyncio.wait({waiting}, timeout=None if seconds is None else seconds / _SLICES)
        if waiting.done():
            return True
    return False


class Pool:
    """A pool of threads for calls that may hang. A thread that hangs is replaced. Lives in the event loop.

    Args:
        name: Begins the names of the threads, after `calotype-`.
        count: Number of calls that run at once.
        max_hung: Number of threads to lose. Further calls fail at once, until one of these threads returns.
    """

    def __init__(self, name: str, count: int, *, max_hung: int = _MAX_HUNG) -> None:
        self._name = name
        self._count = count
        self._max_hung = max_hung
        self._executor = ThreadPoolExecutor(count, _PREFIX + name)
        self._free = asyncio.Semaphore(count)
        self._hung: list[Future[Any]] = []

    @property
    def hung(self) -> int:
        """Number of threads that hang."""
        return sum(not work.done() for work in self._hung)

    @property
    def is_exhausted(self) -> bool:
        """Whether so many threads hang that no further call can run."""
        return self.hung >= self._max_hung

    async def run(self, seconds: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns the result of `function`.

        Args:
            seconds: Longest duration of the call, without the time until a thread is free.
            function: Runs in a thread, in the caller's context.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Raises:
            Exception: As for `contained`.
            ThreadHangs: The call took longer than `seconds`.
            ThreadsExhausted: Too many threads hang.
        """
        async with self._free:
            if self.is_exhausted:
                raise ThreadsExhausted(f"{self.hung} threads hang")
            work = submit(self._executor, function, *args, **kwargs)
            if await completes(work, seconds):
                return work.result()
            self._replace_thread(work)
            raise ThreadHangs(f"no result after {seconds:g} s")

    def close(self) -> None:
        """Waits for running calls, except those that hang, and stops the threads."""
        self._executor.shutdown()

    def _replace_thread(self, work: Future[Any]) -> None:
        """Gives up the threads: the one that hangs, and its siblings after their current calls."""
        self._hung = [*(each for each in self._hung if not each.done()), work]
        self._executor.shutdown(wait=False)
        self._executor = ThreadPoolExecutor(self._count, _PREFIX + self._name)


def stacks() -> dict[str, list[str]]:
    """Returns the stacks of Calotype's threads, innermost call last: file, line and function, without values."""
    names = {thread.ident: thread.name for thread in threading.enumerate() if thread.name.startswith(_PREFIX)}
    # Not `extract_stack`, which reads the source files: the disk may hang.
    return {
        names[ident]: [
            f"{each.f_code.co_filename}:{line} {each.f_code.co_name}" for each, line in traceback.walk_stack(frame)
        ][::-1]
        for ident, frame in sys._current_frames().items()
        if ident in names
    }
