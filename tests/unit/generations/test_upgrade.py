"""State files that earlier versions wrote can be read. `tests/fixtures/state/` has one file for each version.

After a change of the format: raise its version, and add a file with
`PYTHONPATH=tests python -m support.state.fixture tests/fixtures/state/VERSION`. Never change an existing file.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from calotype_server import errors
from calotype_server.generations.state.file import VERSION
from support.engine.fake_engine import FakeEngine
from support.runtime import running_runtime
from support.state.fixture import FIXTURE_IMAGE, fixture_records
from support.state.folders import FILE, opened

FOLDERS = sorted((Path(__file__).parents[2] / "fixtures" / "state").iterdir())


def test_the_current_version_has_a_file() -> None:
    """A change of the format comes with a new file."""
    assert str(VERSION) in [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
async def test_a_file_of_an_earlier_version_is_read(tmp_path: Path, folder: Path) -> None:
    """Records, attempts, ends and the image are those that were written, and the unfinished generations run."""
    shutil.copy(folder / FILE, tmp_path)
    waiting, ran, crashed, succeeded, failed = fixture_records()
    engine = FakeEngine()
    async with opened(tmp_path) as store:
        assert store.replica == "f1c2e3a4"
        records = await store.load()
        assert [replace(each, end=None) for each in records] == [waiting, ran, crashed, succeeded, failed]
        assert records[3].end.finished_early
        assert (records[3].end.step, records[3].end.total_steps, records[3].end.timings.total) == (3, 4, 1.5)
        assert await store.image(succeeded.generation_id) == FIXTURE_IMAGE
        assert isinstance(records[4].end.error, errors.OutOfMemory)
        async with running_runtime(engine, store=store) as runtime:
            await runtime.generations.idle()
    assert [job.seed for job in engine.jobs] == [waiting.job.seed, ran.job.seed]
