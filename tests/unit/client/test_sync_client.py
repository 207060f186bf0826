"""The script that generates the sync client."""

import importlib.util
from pathlib import Path

import pytest

import calotype

SCRIPT = Path(calotype.__file__).parents[1] / "sync_client.py"


@pytest.fixture
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("sync_client", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asynchronous", "sync"),
    [
        ("async def f() -> AsyncIterator[int]:", "def f() -> Iterator[int]:"),
        ("return await self._calls.model()", "return self._calls.model()"),
        ("async with AsyncClient(address) as client:", "with Client(address) as client:"),
        ("[each async for each in self.ask()]", "[each for each in self.ask()]"),
        ("async def __aenter__(self) -> Self:", "def __enter__(self) -> Self:"),
        ("async def __aexit__(self) -> None:", "def __exit__(self) -> None:"),
        ("async def __aiter__(self):", "def __iter__(self):"),
        ("async def aclose(self) -> None:", "def close(self) -> None:"),
        ("first = await anext(aiter(each), None)", "first = next(iter(each), None)"),
        ("async with aclosing(answers):", "with closing(answers):"),
        ("from .._backends.aio.primitives import Lock", "from .._backends.threads.primitives import Lock"),
        ("`AsyncGeneration`", "`Generation`"),
        ("# An asynchronous awaiting", "# An asynchronous awaiting"),
    ],
)
def test_conversion_replaces_keywords_and_names(script, asynchronous, sync):
    """Asyncio syntax and names become those of the sync client; other words stay."""
    assert script.convert(asynchronous) == sync


def test_committed_client_is_up_to_date(script):
    """The committed sync client equals the conversion of the asyncio client."""
    assert script.differences(script.generate()) == ""


def test_generated_files_name_their_source(script):
    """Each generated file begins with a header that names its source and the command."""
    for path in script.TARGET.glob("*.py"):
        first = path.read_text().splitlines()[0]
        assert first == f"# Generated from calotype/_async/{path.name} by `make sync-client`; do not edit."


def test_check_fails_on_a_difference(script, monkeypatch, capsys):
    """`--check` exits with 1, prints a diff and names the command when a file is out of date or left over."""
    stale = {path: text.replace("Client", "Customer") for path, text in script.generate().items()}
    del stale[script.TARGET / "calls.py"]
    monkeypatch.setattr(script, "generate", lambda: stale)
    assert script.main(["--check"]) == 1
    printed = capsys.readouterr().err
    assert "+class Customer:" in printed
    assert "-class Calls:" in printed
    assert "make sync-client" in printed


def test_writing_removes_files_without_a_source(script, monkeypatch, tmp_path):
    """The script writes the generated files and deletes all others."""
    target = tmp_path / "_sync"
    monkeypatch.setattr(script, "TARGET", target)
    target.mkdir()
    (target / "old.py").write_text("")
    assert script.main([]) == 0
    assert {path.name for path in target.iterdir()} == {path.name for path in script.SOURCE.glob("*.py")}


def test_sentence_without_a_source_is_an_error(script, monkeypatch):
    """The script fails when a sentence to replace is no longer in any source."""
    monkeypatch.setitem(script.SENTENCES, "no source contains this", "anything")
    with pytest.raises(ValueError, match="no source contains this"):
        script.generate()
