"""The Muon optimiser for weight matrices: momentum, made orthogonal by a Newton-Schulz iteration.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). A factor from J. Liu et al.,
"Muon is scalable for LLM training" (arXiv:2502.16982), makes its updates as large as AdamW's, so that both share one
learning rate. Each process orthogonalises its share of the matrices and sends them to the others.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # from Jordan et al.: fast, but singular values are 0.7 … 1.2
UPDATE_SIZE = 0.2  # root mean square of AdamW's updates (Liu et al.)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return approximately the closest (semi-)orthogonal matrix, in bf16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. Treats tensors of more than two dimensions as matrices
    of output channels x all other dimensions."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # needs no closure
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            # Sorted by size and distributed in turn, so that each process gets about the same work.
            parameters = sorted(group["params"], key=torch.numel, reverse=True)
            updates = torch.zeros(sum(parameter.numel() for parameter in parameters))
            offset = 0
            for number, parameter in enumerate(parameters):
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                if number % size == rank:
                    direction = parameter.grad.lerp(state["momentum"], group["momentum"])
                    update = orthogonalise(direction.reshape(direction.size(0), -1))
                    updates[offset : offset + parameter.numel()] = update.reshape(-1)
                offset += parameter.numel()
            if size > 1:
                dist.all_reduce(updates)
            offset = 0
            for parameter in parameters:
                update = updates[offset : offset + parameter.numel()].view(parameter.shape)
                offset += parameter.numel()
                scale = UPDATE_SIZE * max(parameter.size(0), parameter.numel() // parameter.size(0)) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


class MuonAndAdamW:
    """Muon for the inner matrices, AdamW at half the rate for the rest (first and last layer, norms, biases).

    `ends` are the name prefixes of the parameters of the first and the last layer.
    """

    def __init__(self, model: nn.Module, rate: float, ends: tuple[str, ...]) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inside = parameter.dim() >= 2 and not name.startswith(ends)
            (matrices if inside else others).append(parameter)
        self.members = (
            Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.03),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, rate: float) -> None:
        for member, share in zip(self.members, (1.0, 0.5), strict=True):
            for group in member.param_groups:
                group["lr"] = rate * share
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)
