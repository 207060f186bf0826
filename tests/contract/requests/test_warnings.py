"""Warnings on every transport: those of the prompt and of the size come first, those of the decoding at the end."""

from __future__ import annotations

from dataclasses import replace

from calotype.v1 import calotype_pb2 as pb
from calotype_server.types import Notice
from support.engine.fake_engine import FakeEngine
from support.service import read_until, running


def reasons(message: pb.Progress) -> list[str]:
    """Returns the reasons of the warnings in a message."""
    return [each.reason for each in message.warnings]


async def test_warnings_arrive_and_stay(transport: str) -> None:
    """A reader sees each warning from the message on that first has it; one that resumes or comes late sees all."""
    engine = FakeEngine()
    engine.model = replace(engine.model, scales_other_sizes=True, min_pixels=0, sizes=((64, 64),))
    engine.notices = (Notice("PROMPT_TRUNCATED", "Long."), Notice("LORA_TAG_IGNORED", "A tag."))
    engine.late_notices = (Notice("DECODED_IN_TILES", "Memory ran out."),)
    engine.decoding.clear()
    early = ["PROMPT_TRUNCATED", "LORA_TAG_IGNORED", "SIZE_SCALED"]
    async with running(engine, transport=transport) as service:
        request = pb.GenerateRequest(prompt="a", width_px=60, height_px=60)
        call = service.stub.Generate(request)
        decoding = await read_until(call, pb.PHASE_DECODING)
        assert reasons(decoding) == early
        resumed = service.stub.Watch(
            pb.WatchRequest(generation_id=decoding.generation_id, after_sequence=decoding.sequence)
        )
        engine.decoding.set()
        for reader in (call, resumed, service.stub.Watch(pb.WatchRequest(generation_id=decoding.generation_id))):
            assert reasons(await read_until(reader, pb.PHASE_SUCCEEDED)) == [*early, "DECODED_IN_TILES"]
