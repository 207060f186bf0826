"""Messages of any order, merging and chunking are assembled to state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype import Cancelled, InternalError, Phase, StreamIncomplete, Unavailable
from calotype._assembler import Assembler
from calotype._status import stream_incomplete
from calotype.v1 import calotype_pb2 as v1

RUNNING = [v1.PHASE_QUEUED, v1.PHASE_ENCODING_PROMPT, v1.PHASE_DENOISING, v1.PHASE_DECODING, 99]

previews = st.builds(
    v1.Progress,
    phase=st.sampled_from(RUNNING),
    step=st.integers(0, 9),
    image=st.binary(max_size=4),
    image_kind=st.sampled_from([v1.IMAGE_KIND_UNSPECIFIED, v1.IMAGE_KIND_PREDICTED]),
)


def chunks(parts):
    """Returns the end of a generation whose image comes in chunks."""
    return [
        v1.Progress(phase=v1.PHASE_SUCCEEDED, image=part, chunk_index=index, chunk_count=len(parts))
        for index, part in enumerate(parts)
    ]


@given(st.lists(previews), st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5))
def test_any_successful_stream_gives_its_image(running, parts):
    """Each message is shown once, the end once, and the image is the sum of its chunks."""
    assembler = Assembler()
    shown = [assembler.feed(message) for message in running]
    assert all(shown)
    assert not assembler.ended
    ends = [assembler.feed(message) for message in chunks(parts)]
    assert ends[:-1] == [None] * (len(parts) - 1)
    assert ends[-1].phase is Phase.SUCCEEDED
    assert ends[-1].preview is None
    assembler.close(Unavailable("too late to matter"))
    assert assembler.outcome().data == b"".join(parts)


@given(st.lists(previews), st.lists(st.binary(min_size=1, max_size=9), min_size=2, max_size=5), st.data())
def test_missing_chunk_is_an_error(running, parts, data):
    """A missing chunk makes the generation incomplete."""
    lost = data.draw(st.integers(0, len(parts) - 1))
    assembler = Assembler()
    for message in [*running, *(chunk for chunk in chunks(parts) if chunk.chunk_index != lost)]:
        assembler.feed(message)
    assembler.close(stream_incomplete())
    with pytest.raises(StreamIncomplete):
        assembler.outcome()


@given(st.lists(previews))
def test_stream_without_an_end_is_incomplete(running):
    """A stream that ends with OK before the end of its generation is incomplete."""
    assembler = Assembler()
    for message in running:
        assembler.feed(message)
    assembler.close(stream_incomplete())
    with pytest.raises(StreamIncomplete):
        assembler.outcome()


@pytest.mark.parametrize(("phase", "kind"), [(v1.PHASE_FAILED, InternalError), (v1.PHASE_CANCELLED, Cancelled)])
def test_end_without_an_error_is_still_an_error(phase, kind):
    """An end without an error message is still an error."""
    assembler = Assembler()
    assert assembler.feed(v1.Progress(phase=phase, step=3)) is None
    assert assembler.progress.step == 3
    with pytest.raises(kind):
        assembler.outcome()


@given(st.lists(previews), st.lists(previews), st.booleans())
def test_withdrawal_is_shown_before_the_error(before, after, merged):
    """However messages are merged, the loop sees the withdrawal, and no preview with it or after it."""
    assembler = Assembler()
    for message in before:
        assembler.feed(message)
    withdrawn = [] if merged else [v1.Progress(phase=v1.PHASE_DENOISING), *after]
    for message in [*withdrawn, end := v1.Progress(phase=v1.PHASE_FAILED)]:
        message.previews_withdrawn = True
    shown = [assembler.feed(message) for message in [*withdrawn, end]]
    withdrawals = [progress for progress in shown if progress is not None]
    assert len(withdrawals) == max(1, len(withdrawn))
    assert all(progress.previews_withdrawn and progress.preview is None for progress in withdrawals)
    assert assembler.ended


def test_warnings_accumulate():
    """Warnings accumulate, each once."""
    assembler = Assembler()
    for reasons in (["A"], [], ["B", "A"]):
        assembler.feed(
            v1.Progress(phase=v1.PHASE_DENOISING, warnings=[v1.Warning(reason=reason) for reason in reasons])
        )
    assert [notice.reason for notice in assembler.warnings] == ["A", "B"]


def test_messages_after_the_end_are_ignored():
    """Messages after the end change nothing."""
    assembler = Assembler()
    assembler.feed(chunks([b"image"])[0])
    assert assembler.feed(v1.Progress(phase=v1.PHASE_FAILED)) is None
    assert assembler.outcome().data == b"image"


def test_success_without_an_image_is_stream_incomplete():
    """A final image without data is an error."""
    assembler = Assembler()
    assembler.feed(v1.Progress(phase=v1.PHASE_SUCCEEDED))
    with pytest.raises(StreamIncomplete):
        assembler.outcome()


def test_final_image_is_not_a_preview():
    """Only predicted images are previews."""
    assembler = Assembler()
    shown = assembler.feed(v1.Progress(phase=v1.PHASE_DENOISING, image=b"x", image_kind=v1.IMAGE_KIND_FINAL))
    assert shown.preview is None
