"""Shared by the trainings: two processes, batches by sample number, learning rate, EMA, checkpoints, the log.

All randomness depends only on the seed, the rank and the number of samples seen, so a resumed run equals an
uninterrupted one.
"""

import math
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

PROCESSES = 2  # one torch thread each: faster on two cores than two threads in one process
CHECKPOINT_SECONDS = 120


def start_processes(rank: int, port: int) -> None:
    """Join the group of `PROCESSES` processes; rank 0 starts the others with its own command line."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # denormal numbers, common early in training, are about 100 times slower
    if rank == 0:
        for other in range(1, PROCESSES):
            subprocess.Popen([sys.executable, *sys.argv, "--rank", str(other)])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # A long timeout, so that the processes can be suspended and continued.
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=timedelta(hours=24))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes (one message for all of them)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def batch_indices(first: int, count: int, size: int, seed: int) -> Tensor:
    """Return the image numbers of samples `first` … `first + count - 1`: each epoch is a different permutation."""
    numbers: list[Tensor] = []
    for sample in range(first, first + count):
        epoch, position = divmod(sample, size)
        if not numbers or position == 0:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        numbers.append(order[position])
    return torch.stack(numbers)


def generator(seed: int, rank: int, samples: int) -> torch.Generator:
    """Return the source of randomness of one step of one process."""
    return torch.Generator().manual_seed((seed * 1_000_003 + samples) * PROCESSES + rank)


def learning_rate(samples: int, total: int, peak: float, warmup: int, hold: float) -> float:
    """Return the rate after `samples` of `total`: linear warm-up, `peak` up to the share `hold`, then a cosine to 0."""
    share = samples / total
    decay = 1.0 if share < hold else 0.5 * (1 + math.cos(math.pi * min(1.0, (share - hold) / (1 - hold))))
    return peak * min(1.0, (samples + 1) / warmup) * decay


class Ema:
    """An exponential moving average of a model's weights; its memory grows from 10 steps to 1 / (1 - `decay`)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(list(self.weights.values()), list(model.state_dict().values()), 1 - decay)


class Stateful(Protocol):
    """An optimiser, or several that act as one."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> None: ...


class Checkpoint:
    """The file from which a run resumes: weights, their average, the optimiser's state, and the samples seen."""

    def __init__(self, path: Path, model: nn.Module, ema: Ema, optimizer: Stateful) -> None:
        self.path, self.model, self.ema, self.optimizer = path, model, ema, optimizer
        self.saved = time.monotonic()

    def load(self) -> int:
        """Restore the run if there is one; return the number of samples seen so far."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.weights, self.ema.steps = state["ema"], state["ema_steps"]
        return state["samples"]

    def due(self) -> bool:
        return time.monotonic() - self.saved > CHECKPOINT_SECONDS

    def save(self, samples: int) -> None:
        """Write the file under another name, then rename it: a kill never leaves a partial checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.weights,
            "ema_steps": self.ema.steps,
            "samples": samples,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)
        self.saved = time.monotonic()


class Log:
    """Appends the means of the last steps to a CSV file (samples, seconds, rate, …) and prints them."""

    def __init__(self, path: Path, fields: list[str]) -> None:
        self.path, self.fields = path, fields
        self.rows: list[list[float]] = []
        self.started = time.monotonic()
        if not path.exists():
            path.write_text(",".join(["samples", "seconds", "learning_rate", *fields]) + "\n")

    def add(self, samples: int, rate: float, values: list[float], every: int = 50) -> None:
        self.rows.append(values)
        if len(self.rows) < every:
            return
        means = [sum(column) / len(self.rows) for column in zip(*self.rows, strict=True)]
        numbers = [f"{value:.5g}" for value in (time.monotonic() - self.started, rate, *means)]
        with self.path.open("a") as file:
            file.write(",".join([str(samples), *numbers]) + "\n")
        named = zip(["seconds", "learning_rate", *self.fields], numbers, strict=True)
        print(samples, " ".join(f"{name} {number}" for name, number in named), flush=True)
        self.rows.clear()


def warm_start(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into `model` where names agree. If shapes differ, copy the overlapping corner."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            if name in own and own[name].dim() == tensor.dim():
                corner = tuple(slice(min(a, b)) for a, b in zip(own[name].shape, tensor.shape, strict=True))
                own[name][corner] = tensor[corner].to(own[name].dtype)
