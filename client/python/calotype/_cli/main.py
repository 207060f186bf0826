"""The client's commands of `calotype`. They need an extra: pip install 'calotype[cli]'."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._constants import MAX_MEMBERS, RETRIES
from .._image import FORMATS
from .._options import (
    DisconnectPolicyName,
    FormatName,
    GenerateOptions,
    MethodName,
    Output,
    Previews,
    PriorityName,
    SigmasName,
    SpacingName,
    SpeedName,
)
from .._sync.client import Client
from .._sync.generation import Generation
from .._sync.group import GenerationGroup
from .._types import Phase, Size
from .failures import EXIT_USAGE, exit_with
from .options import (
    FILES,
    PREVIEWS,
    Filmstrip,
    GenerationId,
    Json,
    OutputFile,
    PreviewFolder,
    Retries,
    Timeout,
    parse_loras,
)
from .running import connected, show, show_many
from .server_options import Server, with_server_options
from .waiting import WAIT_SECONDS

__all__ = ["app", "register_missing_server"]

app = typer.Typer(
    name="calotype",
    help="Streams an image while a diffusion model denoises it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@with_server_options
def generate(
    prompt: Annotated[str, typer.Argument(help="Describes the image.")],
    server: Server,
    negative_prompt: Annotated[str | None, typer.Option(help="Describes what the image should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Strength of guidance, 0 to 100.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the initial noise. The same seed gives the same image.")
    ] = None,
    count: Annotated[
        int,
        typer.Option("--count", "-n", min=1, max=MAX_MEMBERS, help="Number of images, each with the next seed."),
    ] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler, or a familiar name such as 'Euler a'; `calotype model` lists them.")
    ] = None,
    sigmas: Annotated[SigmasName | None, typer.Option(help="Noise levels of the steps.")] = None,
    spacing: Annotated[SpacingName | None, typer.Option(help="Spacing of the timesteps.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SCALE]", help="LoRA to apply; `calotype model` lists them. Can be repeated."),
    ] = None,
    weighted: Annotated[
        bool,
        typer.Option("--weighted", help="Read weights in the prompts, such as (red:1.4), and long prompts in parts."),
    ] = False,
    speed: Annotated[
        SpeedName | None,
        typer.Option(help="Speed: fast computes about half of the steps.", show_default="exact"),
    ] = None,
    priority: Annotated[PriorityName | None, typer.Option(help="Rank in the queue.")] = None,
    timeout: Timeout = None,
    retries: Retries = RETRIES,
    wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Time to wait for a server that does not answer yet, such as one just started.",
        ),
    ] = WAIT_SECONDS,
    on_disconnect: Annotated[
        DisconnectPolicyName | None,
        typer.Option(
            help="Effect of Ctrl-C or a lost connection. `watch` can follow a generation that is kept.",
            show_default="cancel",
        ),
    ] = None,
    disconnect_grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time for which the server keeps the generation after a lost connection, 0 to 3600.",
            show_default="10",
        ),
    ] = None,
    request_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Id of the request. A second request with the same id follows the same generation."
        ),
    ] = None,
    output: OutputFile = None,
    file_format: Annotated[
        FormatName | None,
        typer.Option(
            "--format", help="Format of the image.", show_default="from --output, or png", rich_help_panel=FILES
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(help="JPEG quality, 1 to 95, or WebP, 1 to 100.", show_default="90", rich_help_panel=FILES),
    ] = None,
    no_metadata: Annotated[
        bool,
        typer.Option("--no-metadata", help="Do not write prompt, seed etc. into the image.", rich_help_panel=FILES),
    ] = False,
    previews: PreviewFolder = None,
    filmstrip: Filmstrip = None,
    preview_every: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="At most one preview per this many steps.", rich_help_panel=PREVIEWS),
    ] = None,
    preview_interval: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Minimum time between two previews.", rich_help_panel=PREVIEWS),
    ] = None,
    preview_edge: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Maximum length of the longer edge.", rich_help_panel=PREVIEWS)
    ] = None,
    preview_quality: Annotated[
        int | None, typer.Option(help="JPEG quality, from 1 to the server's maximum.", rich_help_panel=PREVIEWS)
    ] = None,
    preview_method: Annotated[
        MethodName | None,
        typer.Option(help="How previews are made; see `calotype model`.", rich_help_panel=PREVIEWS),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate an image and watch it form."""
    preview_options = Previews(
        every_steps=preview_every,
        min_interval=preview_interval,
        max_edge=preview_edge,
        quality=preview_quality,
        method=preview_method,
    )
    output_options = Output(
        # Converting from another format would lose quality, and the parameters in the file.
        format=file_format or (FORMATS.get(output.suffix.lower()) if output else None),
        quality=quality,
        metadata=False if no_metadata else None,
    )

    options: GenerateOptions = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "sigmas": sigmas,
        "spacing": spacing,
        "speed": speed,
        "loras": parse_loras(lora or ()),
        "prompt_syntax": "weighted" if weighted else None,
        "priority": priority,
        "on_disconnect": on_disconnect,
        "disconnect_grace": disconnect_grace,
        "previews": preview_options,
        "output": output_options,
    }

    def start(client: Client) -> Generation:
        return client.generate(prompt, seed=seed, request_id=request_id, timeout=timeout, **options)

    def start_many(client: Client) -> GenerationGroup:
        return client.generate_many(prompt, count, seed=seed, request_id=request_id, timeout=timeout, **options)

    kept = "Stopped watching. The generation continues: see `calotype list` and `calotype watch`."
    left = kept if on_disconnect == "keep" else None
    if count == 1:
        show(server, start, output, previews, filmstrip, retries=retries, wait=wait, as_json=as_json, left=left)
        return
    show_many(
        server, start_many, count, output, previews, filmstrip, retries=retries, wait=wait, as_json=as_json, left=left
    )


@app.command()
@with_server_options
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
    """Watch a generation that is already running, and save its image."""

    def start(client: Client) -> Generation:
        return client.watch(generation_id, timeout=timeout)

    left = "Stopped watching. The generation is not affected."
    show(server, start, output, previews, filmstrip, retries=retries, as_json=as_json, left=left)


@app.command()
@with_server_options
def finish(generation_id: GenerationId, server: Server) -> None:
    """End a generation early; its current estimate becomes the final image."""
    with connected(server) as client:
        phase = client.finish(generation_id)
    typer.echo(_outcome("Finished", phase))


@app.command("list")
@with_server_options
def list_generations(server: Server, as_json: Json = False) -> None:
    """List running and recent generations, newest first."""
    table = Table.grid(padding=(0, 2))
    with connected(server) as client:
        for summary in client.generations():
            if as_json:
                typer.echo(json.dumps(asdict(summary) | {"create_time": summary.create_time.isoformat()}))
            done = f"{summary.step}/{summary.total_steps}" if summary.total_steps else ""
            table.add_row(summary.generation_id, summary.phase.replace("_", " "), done, Text(summary.prompt))
    if not as_json:
        Console().print(table, markup=False, highlight=False)


@app.command()
@with_server_options
def cancel(
    server: Server,
    generation_id: Annotated[
        str | None, typer.Argument(help="A generation_id from `list` or `generate --json`.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Cancel all generations of your group instead. An operator cancels those of all callers.",
        ),
    ] = None,
) -> None:
    """Cancel a generation, or all generations of a group."""
    if (generation_id is None) == (group is None):
        exit_with("Name either a generation_id or a --group.", EXIT_USAGE)
    with connected(server) as client:
        if group is not None:
            typer.echo(f"Cancelled: {client.cancel(group=group)}.")
        else:
            typer.echo(_outcome("Cancelled", client.cancel(generation_id or "")))


@app.command()
@with_server_options
def model(server: Server, as_json: Json = False) -> None:
    """Describe the model that the server has loaded."""
    with connected(server) as client:
        facts = asdict(client.model())
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table.grid(padding=(0, 2))
    facts["scheduler_details"] = "\n".join(map(_describe_scheduler, facts["scheduler_details"]))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _in_words(value))
    Console().print(table, markup=False, highlight=False)


def register_missing_server(why: str) -> None:
    """Adds placeholders for the server's commands, which print what to install.

    Args:
        why: Why the server cannot be imported.
    """

    def missing(context: typer.Context) -> None:
        exit_with(f"`calotype {context.info_name}` needs an extra: pip install 'calotype[server]' ({why})", EXIT_USAGE)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    commands = {
        "serve": "Run a server.",
        "bridge": "Connect browsers to a server on another machine.",
        "keys": "Create and list the API keys of a server.",
        "doctor": "Report what is installed and what is missing.",
    }
    for name, text in commands.items():
        app.command(name, help=f"{text} Needs the extra `server`.", context_settings=settings)(missing)


def _outcome(action: str, phase: Phase) -> str:
    name = phase.replace("_", " ")
    if phase.ended:
        return f"The generation has already {'been ' * (phase is Phase.CANCELLED)}{name}."
    return f"{action} while {name}."


def _describe_scheduler(facts: dict[str, Any]) -> str:
    """Describes a scheduler in one line, such as "EulerDiscreteScheduler (Euler); sigmas karras; spacing leading"."""
    names = f"{facts['name']} ({', '.join(facts['aliases'])})" if facts["aliases"] else facts["name"]
    options = {"sigmas": facts["sigmas"], "spacing": facts["spacings"]}
    return "; ".join([names, *(f"{name} {', '.join(values)}" for name, values in options.items() if values)])


def _in_words(value: object) -> str:
    if isinstance(value, Size):
        return f"{value.width}x{value.height}"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else ", ".join(map(_in_words, value)) if isinstance(value, tuple) else str(value)
