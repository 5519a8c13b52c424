"""The frozen base in shards (FSDP2): each process holds 1/n of it, and a layer is whole only while it computes.

Adapters, optimizer and gradients stay whole on every process and are summed as they are without shards. A forward pass
gathers weights from all processes, so all must make the same passes in the same order: scoring is done by each process
for all rows, and a step is shared only where the method's loss makes one pass a micro-batch.
"""

from __future__ import annotations

import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from forgetless.errors import UsageError
from forgetless.model.adapters import Adapters
from forgetless.model.base import transformer


def asked_for() -> bool:
    """Whether the processes were launched with FSDP (`accelerate launch --use_fsdp`, or a configuration file)."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UsageError(
            f"launched with FSDP version {version}; give `fsdp_version: 2`, which shards each weight alone"
        )
    return True


def shard_base(adapters: Adapters, processes: int, device: torch.device) -> None:
    """Cuts every weight but the adapters' trainable ones into `processes` parts and keeps this process's own."""
    base = transformer(adapters.model)
    mesh = init_device_mesh(device.type, (processes,))
    whole = {parameter for parameter in base.parameters() if parameter.requires_grad}
    kinds = set(base._no_split_modules or ())
    for block in [module for module in base.modules() if type(module).__name__ in kinds]:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def in_shards(adapters: Adapters) -> bool:
    """Whether each process holds a part of the base: then all must make the same passes."""
    return any(isinstance(parameter, DTensor) for parameter in transformer(adapters.model).parameters())
