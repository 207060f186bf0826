"""The output of libraries while a server starts."""

import logging
import subprocess
import sys

import diffusers
import pytest

from calotype_server.engine.libraries import prepare_libraries
from calotype_server.engine.loading.quiet import quiet

_IMPORTS = """
from calotype_server.observability.logs import configure_logging
configure_logging("info", "console")
from calotype_server.engine.libraries import prepare_libraries
prepare_libraries()
import torchao.quantization
from diffusers import StableDiffusionPipeline
import logging
logging.getLogger("torchao").error("a real error")
"""


@pytest.fixture
def _levels():
    """Restores the levels and filters of the loggers."""
    root = logging.getLogger()
    filters, levels = (
        list(root.filters),
        {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")},
    )
    yield
    root.filters[:] = filters
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_levels")
def test_advice_of_imports_is_hidden(caplog):
    """Warnings of torchao about other machines are not logged; errors, and warnings of the server, are."""
    prepare_libraries()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).warning("advice")
        logging.getLogger(name).error("an error of %s", name)
    logging.getLogger().warning("Warning: Detected no triton, on systems without Triton ...")
    logging.getLogger().warning("useful")
    assert [record.getMessage() for record in caplog.records] == [
        "an error of torchao",
        "an error of torch.utils._pytree",
        "useful",
    ]


@pytest.mark.slow
def test_imports_write_nothing():
    """A start with torchao installed has no output of the libraries, but shows an error."""
    done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("a real error")


def test_errors_of_diffusers_are_hidden_only_while_a_model_is_loaded():
    """Loading raises each error that diffusers would log, some over many lines; later errors are logged again."""
    log = logging.getLogger("diffusers")
    with quiet():
        assert not log.isEnabledFor(logging.ERROR)
    assert log.isEnabledFor(logging.ERROR)
    assert diffusers.utils.logging.get_verbosity() == logging.ERROR


def test_warnings_of_the_hub_are_logged_once():
    """The hub's library does not print its warnings beside the server's log."""
    log = logging.getLogger("huggingface_hub")
    log.addHandler(logging.StreamHandler())
    with quiet():
        assert not log.handlers
        assert log.propagate
