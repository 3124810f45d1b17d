"""Weights that one process has read go to the others, which so need neither the disk nor a machine's memory for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn


def send_from_first(module: nn.Module, device: torch.device) -> None:
    """Brings the parameters and buffers of a module to a device, in all processes as the first one has them.

    The others may have them on the meta device. What is tied stays tied, and what is spread over processes already, as it
    is. Every process must call it.
    """
    sent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old ones too, so that no other gets their number

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in sent:
            sent[id(tensor)] = tensor, _sent(tensor, device)
        return sent[id(tensor)][1]

    for owner in module.modules():
        others = {name: value for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}
        places: Any
        for places in (owner._parameters, owner._buffers, others):
            for name, tensor in places.items():
                if tensor is not None and not hasattr(tensor, "device_mesh"):
                    places[name] = replaced(tensor)
        vars(owner).update(others)


@torch.no_grad()
def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    own = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).contiguous()
    distributed.broadcast(own, 0)
    return nn.Parameter(own, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
