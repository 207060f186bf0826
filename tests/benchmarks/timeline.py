"""Draws the calls of the denoiser from the engine's own records: `make timeline`.

The first picture shows eight overlapping generations. Each mark is a call of the denoiser. Marks of one colour in one
column were one call: a batch. Generations start and end at any step of the others. The second picture shows eight users
who arrive together at a model that takes turns, with each schedule.
"""

from __future__ import annotations

import statistics
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
from benchmarks.turns import USERS, TurnsRun, run_turns
from calotype_server.engine.protocol import Stop
from calotype_server.types import EncodingPrompt, Event, Job, Schedule

if TYPE_CHECKING:
    from calotype_server.engine.batching.batch_runner import BatchRecord

TARGET = Path("service/timeline.png")
SCHEDULES_TARGET = Path("service/schedules.png")
PROMPTS = ("a red apple", "fox", "banana", "umbrella", "cookie", "broken heart", "alien", "strawberry")
STEPS = (20, 12, 16, 8, 20, 10, 14, 6)
STAGGER_SECONDS = 0.12
JOB = Job(PROMPTS[0], None, 128, 128, 20, GUIDANCE, 0, "DDIMScheduler")

WIDTH, ROW, LEFT, TOP, BOTTOM = 1400, 34, 190, 16, 44
INK, GRID, IDLE = "#333333", "#dddddd", "#eeeeee"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe & Ito: colour-blind safe


TURNS_STEPS = 10
TURNS_SECONDS = 0.05
TURN, TURNS_TOP, TURNS_GAP = 13, 30, 26
NOTES = {
    Schedule.FIRST_LOOK: "first-look (default): every first step, then the oldest",
    Schedule.FAIR: "fair: in turn",
    Schedule.FIFO: "fifo: the oldest",
}


def main() -> None:
    """Runs the generations and draws their calls."""
    draw_overlapping()
    runs = {schedule: run_turns(schedule, TURNS_STEPS, seconds=TURNS_SECONDS) for schedule in NOTES}
    draw_schedules(runs).save(SCHEDULES_TARGET, optimize=True)
    print(f"wrote {SCHEDULES_TARGET}")


def draw_overlapping() -> None:
    """Runs overlapping generations of the bundled model, and draws them."""
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


def draw_schedules(runs: dict[Schedule, TurnsRun]) -> PIL.Image.Image:
    """Returns the picture: a panel for each schedule, in it a row for each user, and time from left to right."""
    panel = TURNS_TOP + TURN * USERS + TURNS_GAP
    image = PIL.Image.new("RGB", (WIDTH, panel * len(runs) + 6), "white")
    pen, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(14)
    left, longest = 90, max(max(run.ends) for run in runs.values())
    for number, (schedule, run) in enumerate(runs.items()):
        top = number * panel + TURNS_TOP
        first = run.records[0].started

        def x(moment: float, first: float = first) -> float:
            return left + (moment - first) / longest * (WIDTH - left - 20)

        look = statistics.mean(run.looks) / TURNS_SECONDS
        end = statistics.mean(run.ends) / TURNS_SECONDS
        pen.text((8, top - 14), NOTES[schedule], INK, font, anchor="lm")
        note = f"mean first preview after {look:.1f} steps, mean end after {end:.1f}"
        pen.text((WIDTH - 20, top - 14), note, INK, font, anchor="rm")
        for user in range(USERS):
            y = top + TURN * user
            pen.text((8, y + TURN // 2), f"user {user + 1}", INK, PIL.ImageFont.load_default(11), anchor="lm")
            own = [record for record in run.records if user in record.sessions]
            pen.line([(x(first), y + TURN // 2), (x(own[-1].started), y + TURN // 2)], GRID)
            for step, record in enumerate(own):
                box = [x(record.started), y + 2, x(record.started + record.seconds) - 2, y + TURN - 3]
                pen.rectangle(box, COLOURS[1] if step == 0 else COLOURS[0])
    legend = f"{USERS} users, {TURNS_STEPS} steps each; orange: first step of a user, with the first preview"
    pen.text((8, panel * len(runs) - 8), legend, INK, font, anchor="lm")
    return image


if __name__ == "__main__":
    main()
