"""Messages of several calls become one stream that never goes back."""

from calotype._resume.continuity import Continuity
from calotype.v1 import calotype_pb2 as v1


def test_messages_before_a_lost_end_are_not_shown_again():
    """The end of a restarted generation is lost after its first chunk; the messages before it hold no news."""
    continuity = Continuity()
    assert continuity.join(v1.Progress(generation_id="a", phase=v1.PHASE_DECODING, step=5, sequence=13))
    continuity.cut()
    end = v1.Progress(generation_id="b", phase=v1.PHASE_SUCCEEDED, step=5, sequence=9, chunk_count=2)
    assert continuity.join(end)
    continuity.cut()
    late = v1.Progress(generation_id="b", phase=v1.PHASE_DENOISING, step=5, sequence=7, image_step=5)
    assert continuity.join(late) is None
