"""Settings, their ranges and their contradictions."""

from __future__ import annotations

import contextlib
import inspect
import os
import runpy
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from calotype.__main__ import main as calotype_main
from calotype._cli import main as cli
from calotype._cli.server_options import Server, with_server_options
from calotype_server.cli import main
from calotype_server.cli.options import help_text, with_settings
from calotype_server.limits import DEFAULT_LIMITS
from calotype_server.observability import tracing
from calotype_server.settings import BridgeSettings, Settings, WebSettings
from calotype_server.settings.parsing import split_list
from calotype_server.types import PreviewMethod, PreviewOptions

SERVICE = Path(__file__).parents[2] / "service"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CALOTYPE_"):
            monkeypatch.delenv(name)


def test_limits_follow_the_settings() -> None:
    """Every preview setting reaches the limits that requests are checked against."""
    limits = Settings(
        preview_method=PreviewMethod.HEAD,
        preview_methods="head, tiny_vae",
        preview_every_steps=3,
        preview_min_interval=0.5,
        preview_edge=200,
        preview_quality=60,
        max_preview_edge=300,
        max_preview_quality=70,
    ).limits
    assert limits.preview == PreviewOptions(3, 0.5, 200, 60, PreviewMethod.HEAD)
    assert (limits.max_preview_edge, limits.max_preview_quality) == (300, 70)
    assert limits.preview_methods == {PreviewMethod.HEAD, PreviewMethod.TINY_VAE}


def test_defaults_allow_everything() -> None:
    """By default, requests may choose any method, and the budget chooses otherwise."""
    limits = Settings().limits
    assert limits == DEFAULT_LIMITS
    assert limits.preview == PreviewOptions()
    assert limits.preview_methods == {PreviewMethod.HEAD, PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE}


def test_an_unset_default_follows_a_lower_maximum() -> None:
    """Operators can lower a maximum without setting the default as well."""
    limits = Settings(max_preview_edge=100, max_preview_quality=40).limits
    assert (limits.preview.max_edge, limits.preview.quality) == (100, 40)


def test_a_default_from_a_variable_can_contradict_a_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default set by a variable is not lowered silently to a maximum set by an option."""
    monkeypatch.setenv("CALOTYPE_PREVIEW_EDGE", "512")
    with pytest.raises(pydantic.ValidationError, match="preview_edge is above max_preview_edge"):
        Settings(max_preview_edge=256)


def test_all_preview_methods_can_be_forbidden() -> None:
    """Operators can turn previews off."""
    assert Settings(preview_methods="").limits.preview_methods == frozenset()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--preview-edge", "900", "--max-preview-edge", "800"], ["preview_edge is above max_preview_edge"]),
        (["--preview-quality", "90", "--max-preview-quality", "80"], ["preview_quality is above max_preview_quality"]),
        (
            ["--preview-method", "full_vae", "--preview-methods", "head,tiny_vae"],
            ["preview_method full_vae is not among preview_methods"],
        ),
        (["--preview-methods", "head,taesd"], ["--preview-methods", "'head,taesd'", "full_vae, head, tiny_vae"]),
        (["--preview-methods", "none"], ["--preview-methods", "'none'"]),
        (["--preview-method", "best"], ["--preview-method", "'auto'"]),
        (["--preview-every-steps", "0"], ["--preview-every-steps", "greater than or equal to 1"]),
        (["--preview-min-interval", "61"], ["--preview-min-interval", "60"]),
        (["--preview-budget", "0"], ["--preview-budget", "greater than 0"]),
        (["--max-preview-quality", "96"], ["--max-preview-quality", "95"]),
        (["--max-preview-edge", "15"], ["--max-preview-edge", "16"]),
    ],
)
def test_invalid_options_are_reported_in_one_line(options: list[str], expected: list[str]) -> None:
    """The exit code is 2 and there is no traceback; a contradiction names both settings."""
    app = typer.Typer()
    app.callback()(lambda: None)
    main.register(app)
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("calotype: ")
    assert all(word in line for word in expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("preview_quality", "Range: 1 to 95."),
        ("preview_budget", "Range: above 0 to 1."),
        ("max_pixels", "At least 64."),
        ("encode_timeout_seconds", "Above 0."),
        ("max_queue", "are rejected."),
    ],
)
def test_help_texts_end_with_the_range(name: str, expected: str) -> None:
    """The range in a help text is the one that is checked; numbers that are just not negative have none."""
    assert help_text(Settings.model_fields[name]).endswith(expected)


@pytest.mark.parametrize("kind", [Settings, BridgeSettings])
def test_every_setting_has_a_description(kind: type[WebSettings]) -> None:
    """Help texts are sentences, and say what the default is where its value alone does not."""
    for name, field in kind.model_fields.items():
        assert (field.description or "").endswith("."), name


EMPTY = ["", " ", "\t\n"]
ALL_SETTINGS = [(kind, name) for kind in (Settings, BridgeSettings) for name in kind.model_fields]


@pytest.mark.parametrize(("kind", "name"), ALL_SETTINGS)
def test_an_empty_variable_counts_as_unset(kind: type[WebSettings], name: str, monkeypatch) -> None:
    """Compose files set variables to nothing. Only where the default protects less, that is an error."""
    default = kind()
    for value in EMPTY:
        monkeypatch.setenv(f"CALOTYPE_{name.upper()}", value)
        if name in kind.guarded:
            with pytest.raises(pydantic.ValidationError, match="is empty; give it a value") as caught:
                kind()
            assert caught.value.errors()[0]["loc"] == (name,)
        else:
            assert kind() == default
            assert name not in kind().model_fields_set


@pytest.mark.parametrize(("kind", "name"), ALL_SETTINGS)
def test_an_empty_option_is_an_error_except_for_lists(kind: type[WebSettings], name: str) -> None:
    """`--state ""` is a mistake, and never means the current folder; `--allowed-origins ""` allows none."""
    for value in EMPTY:
        options: Any = {name: value}
        if name in kind.lists:
            assert split_list(getattr(kind(**options), name)) == ()
            continue
        with pytest.raises(pydantic.ValidationError, match=r"is empty; give it a value|must name at least one server"):
            kind(**options)


@pytest.mark.parametrize("command", ["serve", "bridge"])
def test_an_empty_variable_for_keys_or_certificates_does_not_start_a_server(command: str, monkeypatch) -> None:
    """A missing value in a template must not turn off keys or encryption."""
    for name in ("API_KEYS", "TLS_CERTIFICATE"):
        monkeypatch.setenv(f"CALOTYPE_{name}", "")
    app = typer.Typer()
    app.callback()(lambda: None)
    main.register(app)
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    reason = "is empty; give it a value, or leave the option and its variable out"
    assert set(result.stderr.splitlines()) == {
        f"calotype: --api-keys: {reason}",
        f"calotype: --tls-certificate: {reason}",
    }


@pytest.mark.parametrize("value", EMPTY)
def test_the_clients_empty_variables_count_as_unset(value: str, monkeypatch) -> None:
    """The command line uses the defaults of its options."""
    for parameter in inspect.signature(Server).parameters.values():
        [option] = [each for each in get_args(parameter.annotation) if isinstance(each, OptionInfo)]
        monkeypatch.setenv(str(option.envvar), value)
    found: list[Server] = []

    def probe(server: Server) -> None:
        found.append(server)

    app = typer.Typer()
    app.command()(with_server_options(probe))
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("sys.argv", ["calotype", "probe"])
    with pytest.raises(SystemExit) as ended:
        calotype_main()
    assert (ended.value.code, found) == (0, [Server()])


@pytest.mark.parametrize("value", EMPTY)
def test_the_container_checks_the_default_port_if_the_variables_are_empty(value: str, monkeypatch) -> None:
    """The health check reads the variables as the server does: without a certificate, and on the default port."""
    monkeypatch.setenv("CALOTYPE_WEB_ADDRESS", value)
    monkeypatch.setenv("CALOTYPE_TLS_CERTIFICATE", value)
    asked: list[str] = []

    def urlopen(url: str, **_: object) -> contextlib.nullcontext[None]:
        asked.append(url)
        return contextlib.nullcontext()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert runpy.run_path(str(SERVICE / "healthcheck.py"))["main"]() == 0
    assert asked == ["http://127.0.0.1:8080/readyz"]


def test_opentelemetrys_empty_variables_count_as_unset(monkeypatch) -> None:
    """Spans have the default name of the service, and go to the default protocol."""
    for name in ("OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_TRACES_EXPORTER"):
        monkeypatch.setenv(name, "")
    found = tracing.from_environment("1", required=True)
    assert found is not None
    try:
        assert found._provider.resource.attributes["service.name"] == "calotype"
    finally:
        found._provider.shutdown()


def test_embeddings_are_named() -> None:
    """`--embedding` is repeatable, its variable is a list, and each entry has a name of its own."""
    entries = ("a=one.safetensors", "b=org/name:two.safetensors")
    assert Settings(embedding=",".join(entries)).embedding == Settings(embedding=entries).embedding == entries
    for wrong, message in (("one.safetensors", "not NAME=VALUE"), ("a b=x", "not a name"), ("a=x,a=y", "twice")):
        with pytest.raises(pydantic.ValidationError, match=message):
            Settings(embedding=wrong)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a=x.safetensors, b=org/name:f.safetensors", {"a": "x.safetensors", "b": "org/name:f.safetensors"}),
        ('["a=x,y", "b=z=1"]', {"a": "x,y", "b": "z=1"}),
        ("", {}),
    ],
)
def test_the_variable_for_loras_is_a_list(value: str, expected: dict[str, str], monkeypatch) -> None:
    """`CALOTYPE_LORA` takes a list with commas, or one in JSON, for paths that have commas."""
    monkeypatch.setenv("CALOTYPE_LORA", value)
    assert Settings().lora_sources == expected


def test_the_option_for_loras_is_repeated() -> None:
    """Each `--lora` adds one; a comma is part of its path."""
    found: list[Settings] = []
    app = typer.Typer()
    app.command()(with_settings(found.append, Settings))
    assert CliRunner().invoke(app, ["--lora", "a=x,y", "--lora", "b=z"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0
    assert [settings.lora_sources for settings in found] == [{"a": "x,y", "b": "z"}, {}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("style", "is not NAME=VALUE"),
        ("style=", "is not NAME=VALUE"),
        ("a:b=x", "is not a name"),
        ("-a=x", "is not a name"),
        ("a=x,a=y", "occurs twice"),
        ('["a=x"', "is not valid JSON"),
        ("[1]", "is not a list of strings"),
    ],
)
def test_invalid_loras_are_settings_errors(value: str, reason: str) -> None:
    """A name must be unique, and fit into a prompt's tag and a URL."""
    with pytest.raises(pydantic.ValidationError, match=reason):
        Settings(lora=value)
