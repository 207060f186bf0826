"""Messages fold into state, whatever their order, merging and chunking."""

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
    """The end of a generation whose image comes in parts."""
    return [
        v1.Progress(phase=v1.PHASE_SUCCEEDED, image=part, chunk_index=index, chunk_count=len(parts))
        for index, part in enumerate(parts)
    ]


@given(st.lists(previews), st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5))
def test_any_stream_that_succeeds_gives_its_image(running, parts):
    """Progress is shown once per message, the end once, and the image is the sum of its chunks."""
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
def test_lost_chunk_is_never_taken_for_an_image(running, parts, data):
    """Whichever chunk is lost, the generation is incomplete."""
    lost = data.draw(st.integers(0, len(parts) - 1))
    assembler = Assembler()
    for message in [*running, *(chunk for chunk in chunks(parts) if chunk.chunk_index != lost)]:
        assembler.feed(message)
    assembler.close(stream_incomplete())
    with pytest.raises(StreamIncomplete):
        assembler.outcome()


@given(st.lists(previews))
def test_stream_without_an_end_is_incomplete(running):
    """A status of OK alone does not prove that a generation succeeded."""
    assembler = Assembler()
    for message in running:
        assembler.feed(message)
    assembler.close(stream_incomplete())
    with pytest.raises(StreamIncomplete):
        assembler.outcome()


@pytest.mark.parametrize(("phase", "kind"), [(v1.PHASE_FAILED, InternalError), (v1.PHASE_CANCELLED, Cancelled)])
def test_end_without_an_error_is_still_an_error(phase, kind):
    """A server that forgets to say why has failed all the same."""
    assembler = Assembler()
    assert assembler.feed(v1.Progress(phase=phase, step=3)) is None
    assert assembler.progress.step == 3
    with pytest.raises(kind):
        assembler.outcome()


@given(st.lists(previews), st.lists(previews), st.booleans())
def test_withdrawal_is_shown_before_the_error(before, after, merged):
    """Whichever messages were merged, the loop sees the withdrawal, and no preview with it or after it."""
    assembler = Assembler()
    for message in before:
        assembler.feed(message)
    withdrawn = [] if merged else [v1.Progress(phase=v1.PHASE_DENOISING), *after]
    for message in [*withdrawn, end := v1.Progress(phase=v1.PHASE_FAILED)]:
        message.previews_withdrawn = True
    shown = [assembler.feed(message) for message in [*withdrawn, end]]
    told = [progress for progress in shown if progress is not None]
    assert len(told) == max(1, len(withdrawn))
    assert all(progress.previews_withdrawn and progress.preview is None for progress in told)
    assert assembler.ended


def test_warnings_add_up():
    """A warning that came once is remembered, and one that came often is told once."""
    assembler = Assembler()
    for reasons in (["A"], [], ["B", "A"]):
        assembler.feed(
            v1.Progress(phase=v1.PHASE_DENOISING, warnings=[v1.Warning(reason=reason) for reason in reasons])
        )
    assert [notice.reason for notice in assembler.warnings] == ["A", "B"]


def test_only_the_first_end_counts():
    """Nothing after the end changes it."""
    assembler = Assembler()
    assembler.feed(chunks([b"image"])[0])
    assert assembler.feed(v1.Progress(phase=v1.PHASE_FAILED)) is None
    assert assembler.outcome().data == b"image"


def test_success_without_an_image_is_stream_incomplete():
    """An empty final image is not an image."""
    assembler = Assembler()
    assembler.feed(v1.Progress(phase=v1.PHASE_SUCCEEDED))
    with pytest.raises(StreamIncomplete):
        assembler.outcome()


def test_final_picture_is_not_a_preview():
    """Only predicted pictures are previews."""
    assembler = Assembler()
    shown = assembler.feed(v1.Progress(phase=v1.PHASE_DENOISING, image=b"x", image_kind=v1.IMAGE_KIND_FINAL))
    assert shown.preview is None
