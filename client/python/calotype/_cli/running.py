"""Connects to a server, shows generations and writes their files."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from .._constants import RETRIES
from .._errors import CalotypeError, Cancelled
from .._sync.client import Client
from .._sync.generation import Generation
from .._sync.group import GenerationGroup
from .._types import Phase
from .failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, exit_code, exit_with, explain
from .live_view import LiveView
from .outputs import BadPath, Outputs, numbered
from .quiet import quiet_core
from .server_options import Server
from .text_views import JsonView, PlainView
from .view import View
from .waiting import WaitMessages

__all__ = ["connected", "show", "show_many"]


def show(
    server: Server,
    start: Callable[[Client], Generation],
    output: Path | None,
    previews: Path | None,
    filmstrip: Path | None,
    *,
    retries: int,
    wait: float = 0.0,
    as_json: bool,
    left: str | None,
) -> None:
    """Shows a generation until its end, and writes its files.

    Args:
        server: Where the server is.
        start: Starts or watches the generation.
        output: File for the image. None names it after the seed.
        previews: Folder for the previews. None saves no previews.
        filmstrip: File for the filmstrip. None writes no filmstrip.
        retries: Attempts in a row to reconnect.
        wait: Seconds to wait for a server that cannot be reached at first.
        as_json: Whether to print JSON events.
        left: Message after Ctrl-C for a generation that then continues. None when Ctrl-C cancels it.
    """
    try:
        outputs = Outputs(output, previews, filmstrip)
    except BadPath as error:
        exit_with(str(error), EXIT_USAGE)
    view = _choose_view(Console(), 1, as_json=as_json)
    with _session(server, retries, wait, view, left or "Cancelled.") as (client, messages), view:
        try:
            _follow(start(client), outputs, view, messages)
        except CalotypeError as error:
            view.fail(error)
            raise
        except KeyboardInterrupt:
            if left is None:
                view.fail(Cancelled("Cancelled by this client."))
            raise


def show_many(
    server: Server,
    start: Callable[[Client], GenerationGroup],
    count: int,
    output: Path | None,
    previews: Path | None,
    filmstrip: Path | None,
    *,
    retries: int,
    wait: float,
    as_json: bool,
    left: str | None,
) -> None:
    """Shows several generations until their ends, and writes the files of each; arguments as for `show`.

    If some of them fail, the others are saved nevertheless, and the program ends with an exit code for the first error.
    """
    try:
        outputs = [numbered(output, previews, filmstrip, number + 1) for number in range(count)]
    except BadPath as error:
        exit_with(str(error), EXIT_USAGE)
    view = _choose_view(Console(), count, as_json=as_json)
    with _session(server, retries, wait, view, left or "Cancelled.") as (client, messages):
        with view:
            failures = _follow_group(start(client), outputs, view, messages)
        if len(failures) == count and len({str(failure) for _, failure in failures}) == 1:
            raise failures[0][1]
        for index, failure in failures:
            sys.stderr.write(f"Image {index + 1}: {explain(failure, server)}\n")
        if failures:
            raise typer.Exit(exit_code(failures[0][1]))


def _choose_view(console: Console, count: int, *, as_json: bool) -> View:
    """Chooses the view: JSON if asked for, a live view in a terminal, and plain lines elsewhere."""
    if as_json:
        return JsonView(count)
    is_live = console.is_terminal and not console.is_dumb_terminal
    return LiveView(console, count) if is_live else PlainView(console, count)


def _follow_group(
    group: GenerationGroup, outputs: Sequence[Outputs], view: View, messages: WaitMessages
) -> list[tuple[int, CalotypeError]]:
    """Follows all generations to their ends. Returns the index and the error of each that failed."""
    with group:
        for index, progress in group:
            messages.note_progress()
            view.update(progress, outputs[index].keep(progress), index)
            if progress.phase is Phase.SUCCEEDED:
                image = group.generations[index].result()
                view.finish(progress, image, outputs[index].finish(image, progress.seed), index)
        outcomes = list(enumerate(group.outcomes()))
    failures = [(index, outcome) for index, outcome in outcomes if isinstance(outcome, CalotypeError)]
    for index, error in failures:
        view.fail(error, index)
    return failures


def _follow(generation: Generation, outputs: Outputs, view: View, messages: WaitMessages) -> None:
    for progress in generation:
        messages.note_progress()
        view.update(progress, outputs.keep(progress))
    image = generation.result()
    view.finish(progress, image, outputs.finish(image, progress.seed))


@contextmanager
def connected(server: Server) -> Iterator[Client]:
    """Connects a client. Errors inside the block end the program with a message and an exit code."""
    with _session(server) as (client, _):
        yield client


@contextmanager
def _session(
    server: Server,
    retries: int = RETRIES,
    wait: float = 0.0,
    view: View | None = None,
    on_interrupt: str = "Cancelled.",
) -> Iterator[tuple[Client, WaitMessages]]:
    """Connects a client whose waits are explained to the user. Errors end the program as in `connected`."""
    try:
        with quiet_core() as stderr:
            messages = WaitMessages(server, stderr, view)
            with Client(
                server.address,
                api_key=server.api_key,
                tls=server.credentials(),
                retries=retries,
                wait_for_server=wait,
                on_reconnect=messages.note,
            ) as client:
                yield client, messages
    except CalotypeError as error:
        exit_with(explain(error, server), exit_code(error))
    except KeyboardInterrupt:
        exit_with(on_interrupt, EXIT_INTERRUPTED)
    except BrokenPipeError:
        raise
    except OSError as error:
        exit_with(f"Cannot write {error.filename or 'the output'}: {error.strerror or error}", EXIT_FAILED)
    except ValueError as error:
        exit_with(str(error), EXIT_USAGE)
