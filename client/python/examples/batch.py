"""Draws a picture for each line of a file, when nobody else needs the server, and goes on where it was stopped.

Usage::

    python batch.py prompts.txt pictures/

The picture of line 1 is pictures/0001.png, and so on. What is there already is not drawn again. What the server was at
when this script was stopped is only asked for again, not begun again: each line has a request id of its own.
"""

import argparse
import asyncio
import hashlib
from pathlib import Path

from calotype import AsyncClient, CalotypeError, Overloaded

IN_FLIGHT = 4
"""Pictures asked for at the same time."""


async def draw(client: AsyncClient, slots: asyncio.Semaphore, prompt: str, path: Path, steps: int | None) -> None:
    """Draws one picture, unless it is there."""
    if path.exists():
        return
    async with slots:
        identity = hashlib.sha256(f"{path.resolve()} {prompt} {steps}".encode()).hexdigest()
        while True:
            generation = client.generate(
                prompt, steps=steps, priority="batch", on_disconnect="keep", request_id=identity
            )
            try:
                image = await generation.result()
                break
            except Overloaded as error:
                await asyncio.sleep(error.retry_after or 1)
        # Renamed when it is complete: a file that is there is whole.
        part = path.with_suffix(".part")
        part.write_bytes(image.data)
        part.rename(path)
        print(path, flush=True)


async def main() -> int:
    """Draws them all; returns how many could not be drawn."""
    parser = argparse.ArgumentParser(description="Draws a picture for each line of a file.")
    parser.add_argument("prompts", type=Path, help="a prompt in each line")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--address", default="localhost:50051", help="of the server (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: those of the model)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    prompts = given.prompts.read_text(encoding="utf-8").splitlines()
    slots, failures = asyncio.Semaphore(IN_FLIGHT), 0
    async with AsyncClient(given.address) as client:
        tasks = {
            number: asyncio.create_task(draw(client, slots, prompt, given.folder / f"{number:04}.png", given.steps))
            for number, prompt in enumerate(prompts, 1)
            if prompt.strip()
        }
        for number, task in tasks.items():
            try:
                await task
            except CalotypeError as error:
                failures += 1
                print(f"line {number}: {error}", flush=True)
    return failures


if __name__ == "__main__":
    raise SystemExit(min(asyncio.run(main()), 1))
