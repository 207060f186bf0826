"""service/MODELS.md matches the installed diffusers, and trials of tiny pipelines."""

import pytest

from support import models_table
from support.engine import families
from support.models_table import PAGE, class_rows, family_row, tried_families

REPRESENTATIVE = {"flux_schnell", "ideogram4", "qwen_image", "sd15"}


@pytest.fixture(scope="module")
def lines():
    """The lines of the page."""
    return PAGE.read_text().splitlines()


@pytest.fixture(scope="module")
def tried(lines):
    """The first cells of the rows of tried models."""
    start = lines.index("## Tried")
    end = lines.index("## Pipeline classes")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines[start:end] if line.startswith("| ")]
    return rows[1:]


def test_every_pipeline_class_is_listed(lines, tried):
    """Each pipeline class of diffusers is accepted, or rejected with the message of the service."""
    kinds = {line.split(" | ")[1].strip("`") for line in lines if line.split(" | ")[0].removeprefix("| ") in tried}
    start = lines.index("## Pipeline classes")
    listed = [line for line in lines[start:] if line.startswith("| `")]
    expected = [str(row) for row in class_rows({f"`{kind}`" for kind in kinds})]
    assert listed == expected, "run `make models`"


def test_at_least_35_families_are_tried(tried):
    """Every tiny pipeline that the service accepts is tried, and there are enough of them."""
    assert tried == tried_families()
    assert len(tried) >= 35


@pytest.mark.parametrize(
    "family",
    [name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow) for name in families.ALL],
)
def test_a_trial_has_the_result_that_the_page_states(family, lines):
    """A trial of the family gives its row on the page."""
    if models_table.rejection(type(families.prompted(family))) is not None:
        pytest.skip("the service rejects its pipeline")
    assert str(family_row(family)) in lines, "run `make models`"
