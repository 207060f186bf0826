"""Draws eight overlapping generations from the engine's own records: `make timeline`.

Each mark is a call of the denoiser. Marks of one colour in one column were one call: a batch. Generations start and end
at any step of the others.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from benchmarks.runs import GUIDANCE, bundled_engine
from calotype_server.engine.protocol import Stop
from calotype_server.types import EncodingPrompt, Event, Job

if TYPE_CHECKING:
    from calotype_server.engine.batching.batch_runner import BatchRecord

TARGET = Path("service/timeline.png")
PROMPTS = ("a red apple", "fox", "banana", "umbrella", "cookie", "broken heart", "alien", "strawberry")
STEPS = (20, 12, 16, 8, 20, 10, 14, 6)
STAGGER_SECONDS = 0.12
JOB = Job(PROMPTS[0], None, 128, 128, 20, GUIDANCE, 0, "DDIMScheduler")

WIDTH, ROW, LEFT, TOP, BOTTOM = 1400, 34, 190, 16, 44
INK, GRID, IDLE = "#333333", "#dddddd", "#eeeeee"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe & Ito: colour-blind safe


def main() -> None:
    """Runs the generations and draws their calls."""
    batches: list[BatchRecord] = []
    engine = bundled_engine(max_active=None, on_batch=batches.append)
    engine.run(JOB, lambda _: None, Stop())
    batches.clear()
    spans: dict[int, list[float]] = defaultdict(list)

    def run(index: int) -> None:
        def report(event: Event) -> None:
            if isinstance(event, EncodingPrompt):
                spans[index].append(time.monotonic())

        job = replace(JOB, prompt=PROMPTS[index], step_count=STEPS[index], seed=index)
        engine.run(job, report, Stop())
        spans[index].append(time.monotonic())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
        time.sleep(STAGGER_SECONDS)  # callers arrive one after another
    for thread in threads:
        thread.join()
    engine.close()
    draw(batches, spans).save(TARGET, optimize=True)
    print(f"wrote {TARGET}")


def draw(batches: list[BatchRecord], spans: dict[int, list[float]]) -> PIL.Image.Image:
    """Returns the picture: a row for each generation, time from left to right."""
    begin, end = min(span[0] for span in spans.values()), max(span[1] for span in spans.values())
    rows = {number: row for row, number in enumerate(sorted({s for batch in batches for s in batch.sessions}))}

    def x(moment: float) -> float:
        return LEFT + (moment - begin) / (end - begin) * (WIDTH - LEFT - 20)

    image = PIL.Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + BOTTOM), "white")
    pen, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(14)
    for tenth in range(int((end - begin) * 2) + 1):
        moment = begin + tenth / 2
        pen.line([(x(moment), TOP), (x(moment), TOP + ROW * len(rows))], GRID)
        pen.text((x(moment), TOP + ROW * len(rows) + 12), f"{tenth / 2:g} s", INK, font, anchor="mm")
    for index, span in spans.items():
        y = TOP + ROW * index
        pen.text((8, y + ROW // 2), f"{PROMPTS[index]}, {STEPS[index]} steps", INK, font, anchor="lm")
        pen.rectangle([x(span[0]), y + ROW // 2 - 2, x(span[1]), y + ROW // 2 + 2], IDLE)
    for number, batch in enumerate(batches):
        for stream in batch.sessions:
            y = TOP + ROW * rows[stream]
            box = [x(batch.started), y + 6, x(batch.started + batch.seconds) - 1, y + ROW - 6]
            pen.rectangle(box, COLOURS[number % len(COLOURS)])
    sizes = [len(batch.sessions) for batch in batches]
    note = f"{sum(sizes)} steps in {len(sizes)} calls of the denoiser; up to {max(sizes)} generations in one"
    pen.text((LEFT, TOP + ROW * len(rows) + 32), note, INK, font, anchor="lm")
    return image


if __name__ == "__main__":
    main()
