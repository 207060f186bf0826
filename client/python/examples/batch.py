"""Generates an image for each line of a file, at low priority. Can be stopped and resumed.

Usage::

    python batch.py prompts.txt images/

The image of line 1 is images/0001.png, and so on. Existing files are skipped. Each line has its own request id, so a
second run follows the generations that were running when the first one stopped, and starts none of them twice.
"""

import argparse
import asyncio
import hashlib
from pathlib import Path

from calotype import AsyncClient, CalotypeError, Overloaded

IN_FLIGHT = 4
"""Maximum number of requests at the same time."""


async def generate(client: AsyncClient, slots: asyncio.Semaphore, prompt: str, path: Path, steps: int | None) -> None:
    """Generates one image, unless its file exists. Waits and tries again when the server is overloaded."""
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
        # Rename the complete file, so that a file with the final name is never incomplete.
        part = path.with_suffix(".part")
        part.write_bytes(image.data)
        part.rename(path)
        print(path, flush=True)


async def main() -> int:
    """Generates all images. Returns the number of lines that failed."""
    parser = argparse.ArgumentParser(description="Generates an image for each line of a file.")
    parser.add_argument("prompts", type=Path, help="text file with one prompt per line")
    parser.add_argument("folder", type=Path, help="folder for the images")
    parser.add_argument("--address", default="localhost:50051", help="address of the server (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="number of denoising steps (default: the model's)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    prompts = given.prompts.read_text(encoding="utf-8").splitlines()
    slots, failures = asyncio.Semaphore(IN_FLIGHT), 0
    async with AsyncClient(given.address) as client:
        tasks = {
            number: asyncio.create_task(generate(client, slots, prompt, given.folder / f"{number:04}.png", given.steps))
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
