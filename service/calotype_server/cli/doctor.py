"""`calotype doctor`: checks whether `calotype serve` would start, and says how to fix what is wrong.

It changes and downloads nothing.
"""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import typer

from calotype_server.cli.doctor_additions import additions
from calotype_server.cli.doctor_memory import memory_findings
from calotype_server.cli.findings import Finding
from calotype_server.errors import AcceleratorUnavailable, StartupError
from calotype_server.observability.logs import configure_logging
from calotype_server.transport.net.address import check_free

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calotype_server.settings import Settings

__all__ = ["doctor", "examine"]

_PACKAGES = ("calotype", "grpcio", "protobuf", "torch", "diffusers", "transformers", "pillow")
_EXTRAS = {
    "images in the terminal": "textual_image",
    "notebooks": "IPython",
    "the scheduler LMS and BETA sigmas (pip install scipy)": "scipy",
    "the scheduler DPM++ SDE (pip install torchsde)": "torchsde",
}


def doctor(settings: Settings) -> None:
    """Check this machine: packages, device, model and ports. Takes the options of `serve`."""
    # The report has all findings. Debug lines would add tracebacks.
    configure_logging("warning", settings.log_format)
    failed = False
    for finding in examine(settings):
        mark = typer.style("ok  ", fg="green") if finding.ok else typer.style("FAIL", fg="red")
        typer.echo(f"{mark} {finding.subject:12} {finding.result}")
        if not finding.ok:
            failed = True
            typer.echo(f"     {'':12} {finding.advice}")
    raise typer.Exit(1 if failed else 0)


def examine(settings: Settings) -> Iterator[Finding]:
    """Yields findings in the order in which a start would run into the problems."""
    yield Finding(True, "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            yield Finding(True, package, version(package))
        except PackageNotFoundError:
            yield Finding(
                False, package, "not installed", f"pip install '{package}', or 'calotype[server]' for all packages"
            )
    for purpose, module in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(True, "extra", f"not installed: {purpose}")
    yield _port(settings.grpc_address, "--grpc-address")
    yield _port(settings.web_address, "--web-address")
    yield from _model(settings)


def _port(address: str, option: str) -> Finding:
    try:
        check_free(address, option)
    except StartupError as error:
        return Finding(False, "port", f"cannot listen on {address}", str(error))
    return Finding(True, "port", f"{address} is free")


def _model(settings: Settings) -> Iterator[Finding]:
    try:
        from calotype_server.engine.libraries import prepare_libraries

        prepare_libraries()
        from calotype_server.engine import capabilities, loading
        from calotype_server.engine.loading.explain import is_unreachable
        from calotype_server.engine.requests import trial

        device = loading.pick_device(settings.device)
        options = loading.LoadOptions.of(settings, device, download=False)
        yield Finding(True, "device", f"{device}, {str(options.dtype).removeprefix('torch.')}")
        yield _accelerator(settings.accelerate, device)
        options.check()
        source = loading.locate(settings.model)
        yield from memory_findings(settings, device, options.dtype)
        try:
            pipeline = loading.load_pipeline(options)
        except StartupError as error:
            if not is_unreachable(error):
                raise
            subject = f"{settings.model} is" if isinstance(source, str) else f"the configs of {settings.model} are"
            yield Finding(True, "model", f"{subject} not in the local cache; serve will download what is missing")
            return
        trial.check_draws(settings.model, pipeline)
        defaults = capabilities.Defaults(settings.step_count, settings.guidance_scale, settings.tiny_vae)
        defaults = defaults.or_else(capabilities.read_defaults(source))
        model = capabilities.describe(settings.model, pipeline, defaults)
    except StartupError as error:
        yield Finding(False, "model", f"{settings.model} cannot be used", str(error))
    except RuntimeError as error:
        yield Finding(False, "model", f"{settings.model} cannot draw an image", f"The device failed: {error}")
    except ImportError as error:
        yield Finding(False, "model", f"cannot import {error.name}", "pip install 'calotype[server]'")
    else:
        yield Finding(True, "model", f"{model.name}: {model.pipeline}, {model.width}x{model.height}")
        yield from additions(settings, pipeline, defaults.tiny_vae)


def _accelerator(accelerate: str, device: Any) -> Finding:
    from calotype_server.engine.runtime.select import check_available

    try:
        check_available(accelerate, device)
    except AcceleratorUnavailable as error:
        return Finding(False, "accelerator", f"{accelerate} cannot be used", str(error))
    return Finding(True, "accelerator", accelerate)
