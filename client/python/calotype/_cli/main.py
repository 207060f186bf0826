"""The `calotype` command. Needs the extra: pip install 'calotype[cli]'."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._constants import RETRIES
from .._errors import CalotypeError, Cancelled, InvalidRequest, Unauthenticated, Unavailable
from .._image import FORMATS
from .._options import DisconnectPolicyName, FormatName, MethodName, Output, Previews, PriorityName
from .._sync.client import Client
from .._sync.generation import Generation
from .outputs import BadPath, Outputs
from .quiet import quiet_core
from .server_options import Server, reaching
from .views import View, choose_view

__all__ = ["app", "register_missing_server"]

app = typer.Typer(
    name="calotype",
    help="Streams an image while a diffusion model denoises it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

PREVIEWS, FILES = "Previews", "Files"
OPTIONS = {
    "prompt": "prompt",
    "previews.every_steps": "--preview-every",
    "previews.min_interval": "--preview-interval",
    "previews.max_edge": "--preview-edge",
    "previews.quality": "--preview-quality",
    "previews.method": "--preview-method",
    "output.format": "--format",
    "output.quality": "--quality",
    "output.metadata": "--no-metadata",
}
"""Options whose name is not that of the argument of `Client.generate`."""

GenerationId = Annotated[str, typer.Argument(help="The generation_id that `list` and `generate --json` tell.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds until the image, waiting included.")]
Retries = Annotated[int, typer.Option(help="Attempts to make a lost connection again.")]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The image; .jpg, .png and .webp choose its format.",
        show_default="calotype-SEED.png",
        rich_help_panel=FILES,
    ),
]
PreviewFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep every preview in a folder.", rich_help_panel=FILES)
]
Filmstrip = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Compose previews and image in a row, as a PNG.", rich_help_panel=FILES),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
@reaching
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    server: Server,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Strength of guidance, 0 to 100.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the initial noise; the same seed, the same picture.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Scheduler; `calotype model` lists them.")] = None,
    priority: Annotated[PriorityName | None, typer.Option(help="Rank in the queue.")] = None,
    timeout: Timeout = None,
    retries: Retries = RETRIES,
    on_disconnect: Annotated[
        DisconnectPolicyName | None,
        typer.Option(help="What leaving does; what is kept, `watch` shows.", show_default="cancel"),
    ] = None,
    disconnect_grace: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long the server waits for a lost connection.", show_default="10"),
    ] = None,
    request_id: Annotated[
        str | None, typer.Option(metavar="ID", help="The same id again follows the same generation.")
    ] = None,
    output: OutputFile = None,
    file_format: Annotated[
        FormatName | None,
        typer.Option("--format", help="Format of the image.", show_default="that of -o, or png", rich_help_panel=FILES),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(help="Of JPEG, 1 to 95, or of WebP, 1 to 100.", show_default="90", rich_help_panel=FILES),
    ] = None,
    no_metadata: Annotated[
        bool,
        typer.Option("--no-metadata", help="Leave prompt, seed and the like out of the image.", rich_help_panel=FILES),
    ] = False,
    previews: PreviewFolder = None,
    filmstrip: Filmstrip = None,
    preview_every: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="Show every nth step at most, 1 to 1000.", rich_help_panel=PREVIEWS),
    ] = None,
    preview_interval: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Least time between two previews, 0 to 60.", rich_help_panel=PREVIEWS),
    ] = None,
    preview_edge: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Longer edge at most, from 16.", rich_help_panel=PREVIEWS)
    ] = None,
    preview_quality: Annotated[int | None, typer.Option(help="JPEG quality, from 1.", rich_help_panel=PREVIEWS)] = None,
    preview_method: Annotated[
        MethodName | None,
        typer.Option(
            help="What draws them, if anything; `calotype model` tells what the server has.",
            rich_help_panel=PREVIEWS,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate an image and watch it form."""

    def start(client: Client) -> Generation:
        return client.generate(
            prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            scheduler=scheduler,
            priority=priority,
            on_disconnect=on_disconnect,
            disconnect_grace=disconnect_grace,
            request_id=request_id,
            previews=Previews(
                every_steps=preview_every,
                min_interval=preview_interval,
                max_edge=preview_edge,
                quality=preview_quality,
                method=preview_method,
            ),
            output=Output(
                # Converting another format would cost quality, and the parameters in the file.
                format=file_format or (FORMATS.get(output.suffix.lower()) if output else None),
                quality=quality,
                metadata=False if no_metadata else None,
            ),
            timeout=timeout,
        )

    left = "Left. It goes on: see `calotype list` and `calotype watch`." if on_disconnect == "keep" else None
    _show(server, start, output, previews, filmstrip, retries=retries, as_json=as_json, left=left)


@app.command()
@reaching
def watch(
    generation_id: GenerationId,
    server: Server,
    timeout: Timeout = None,
    retries: Retries = RETRIES,
    output: OutputFile = None,
    previews: PreviewFolder = None,
    filmstrip: Filmstrip = None,
    as_json: Json = False,
) -> None:
    """Watch a generation that was started elsewhere, and get its image."""

    def start(client: Client) -> Generation:
        return client.watch(generation_id, timeout=timeout)

    _show(server, start, output, previews, filmstrip, retries=retries, as_json=as_json, left="Left.")


@app.command()
@reaching
def finish(generation_id: GenerationId, server: Server) -> None:
    """End a generation early: the picture as it is becomes the image."""
    with _connected(server) as client:
        phase = client.finish(generation_id)
    typer.echo(f"It had {phase} already." if phase.ended else f"Finished while {phase.replace('_', ' ')}.")


@app.command("list")
@reaching
def list_generations(server: Server, as_json: Json = False) -> None:
    """List the generations that run or ended a while ago, the newest first."""
    table = Table.grid(padding=(0, 2))
    with _connected(server) as client:
        for summary in client.generations():
            if as_json:
                typer.echo(json.dumps(asdict(summary) | {"create_time": summary.create_time.isoformat()}))
            done = f"{summary.step}/{summary.total_steps}" if summary.total_steps else ""
            table.add_row(summary.generation_id, summary.phase.replace("_", " "), done, Text(summary.prompt))
    if not as_json:
        Console().print(table, markup=False, highlight=False)


@app.command()
@reaching
def cancel(
    generation_id: GenerationId,
    server: Server,
) -> None:
    """Cancel a generation."""
    with _connected(server) as client:
        phase = client.cancel(generation_id)
    typer.echo(f"It had {phase} already." if phase.ended else f"Cancelled while {phase.replace('_', ' ')}.")


@app.command()
@reaching
def model(server: Server, as_json: Json = False) -> None:
    """Describe the model that the server has loaded."""
    with _connected(server) as client:
        facts = asdict(client.model())
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _in_words(value))
    Console().print(table, markup=False, highlight=False)


def register_missing_server(why: str) -> None:
    """Adds commands in the place of the server's that say what to install."""

    def missing(context: typer.Context) -> None:
        _exit(f"`calotype {context.info_name}` needs an extra: pip install 'calotype[server]' ({why})", EXIT_USAGE)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    commands = {
        "serve": "Run a server.",
        "bridge": "Let browsers reach a server elsewhere.",
        "keys": "Make and list the API keys of a server.",
        "doctor": "Say what is installed and what is missing.",
    }
    for name, text in commands.items():
        app.command(name, help=f"{text} Needs the extra `server`.", context_settings=settings)(missing)


def _show(
    server: Server,
    start: Callable[[Client], Generation],
    output: Path | None,
    previews: Path | None,
    filmstrip: Path | None,
    *,
    retries: int,
    as_json: bool,
    left: str | None,
) -> None:
    """Shows a generation to its end, and writes its files. `left` is what an interrupt means that does not cancel."""
    try:
        outputs = Outputs(output, previews, filmstrip)
    except BadPath as error:
        _exit(str(error), EXIT_USAGE)
    view = choose_view(Console(), as_json=as_json)
    with _connected(server, retries, left or "Cancelled.", view.reconnect) as client, view:
        try:
            _follow(start(client), outputs, view)
        except CalotypeError as error:
            view.fail(error)
            raise
        except KeyboardInterrupt:
            if left is None:
                view.fail(Cancelled("Cancelled by this client."))
            raise


def _follow(generation: Generation, outputs: Outputs, view: View) -> None:
    for progress in generation:
        view.update(progress, outputs.keep(progress))
    image = generation.result()
    view.finish(progress, image, outputs.finish(image, progress.seed))


@contextmanager
def _connected(
    server: Server,
    retries: int = RETRIES,
    on_interrupt: str = "Cancelled.",
    on_reconnect: Callable[[CalotypeError, float], None] | None = None,
) -> Iterator[Client]:
    """A client whose errors end the program with one clear sentence and an exit code that says what to do."""
    try:
        client = Client(
            server.address,
            api_key=server.api_key,
            tls=server.credentials(),
            retries=retries,
            on_reconnect=on_reconnect,
        )
        with quiet_core(), client:
            yield client
    except CalotypeError as error:
        _exit(_explain(error, server), _exit_code(error))
    except KeyboardInterrupt:
        _exit(on_interrupt, EXIT_INTERRUPTED)
    except BrokenPipeError:
        raise
    except OSError as error:
        _exit(f"Cannot write {error.filename or 'the output'}: {error.strerror or error}", EXIT_FAILED)
    except ValueError as error:
        _exit(str(error), EXIT_USAGE)


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(part)}" for name, part in value.items())
    return "none" if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)


def _exit(text: str, code: int) -> NoReturn:
    sys.stderr.write(text + "\n")
    raise typer.Exit(code)


def _exit_code(error: CalotypeError) -> int:
    if isinstance(error, InvalidRequest):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_FAILED


def _explain(error: CalotypeError, server: Server) -> str:
    # Only a server gives a reason: without one, nobody answered.
    if isinstance(error, Unavailable) and not error.reason:
        if server.encrypts:
            return f"No Calotype server with a certificate that is trusted answers at {server.address}; see --ca-file"
        if "Socket closed" in error.message or "reset" in error.message:
            return f"What listens at {server.address} hung up: if it is a Calotype server with TLS, give --tls"
        return f"No Calotype server answers at {server.address}; start one with: calotype serve"
    if isinstance(error, Unauthenticated):
        return f"{error} Give a key with --api-key KEY, or as CALOTYPE_API_KEY in the environment."
    if isinstance(error, InvalidRequest) and error.violations:
        lines = [f"  {_option(field)}: {text}" for field, text in error.violations]
        return "\n".join(["The server cannot make this picture:", *lines])
    text = str(error)
    if error.retry_after is not None:
        text += f" Try again in {error.retry_after:.0f} s."
    return text


def _option(argument: str) -> str:
    return OPTIONS.get(argument, f"--{argument.replace('_', '-')}")
