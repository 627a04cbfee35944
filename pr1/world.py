"""The processes of one run: gloo on CPU, NCCL on GPU, one process without either."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """This rank's contiguous share of n things; shares differ by at most one."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maximum over ranks."""
        if self.size == 1:
            return [float(v) for v in values]
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def sum_tensors(self, tensors: list[torch.Tensor], bucket: int = 1 << 26) -> None:
        """Sums each tensor over ranks, in place, in flat buckets of at most `bucket` elements."""
        if self.size == 1:
            return
        start = 0
        while start < len(tensors):
            stop, filled = start + 1, tensors[start].numel()
            while stop < len(tensors) and filled + tensors[stop].numel() <= bucket:
                filled += tensors[stop].numel()
                stop += 1
            flat = torch.cat([t.reshape(-1) for t in tensors[start:stop]])
            dist.all_reduce(flat)
            for tensor, summed in zip(tensors[start:stop], flat.split([t.numel() for t in tensors[start:stop]])):
                tensor.copy_(summed.view_as(tensor))
            start = stop

    def gather(self, thing) -> list:
        """Every rank's (small, picklable) object, in rank order, on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def exchange(self, things: list) -> list:
        """things[r] (picklable, tensors on the CPU) goes to rank r; returns what each rank sent here, in rank order."""
        data = []
        for thing in things:
            buffer = io.BytesIO()
            torch.save(thing, buffer)
            data.append(np.frombuffer(buffer.getvalue(), np.uint8))
        sizes = self.gather([len(x) for x in data])
        arriving = [each[self.rank] for each in sizes]
        received = torch.empty(sum(arriving), dtype=torch.uint8, device=self.device)
        flat = torch.from_numpy(np.concatenate(data)).to(self.device)
        dist.all_to_all_single(received, flat, arriving, [len(x) for x in data])
        parts = received.cpu().split(arriving)
        return [torch.load(io.BytesIO(x.numpy().tobytes()), weights_only=False) for x in parts]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_world() -> World:
    """Reads torchrun's variables; a plain `python` run is a world of one process."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > 1 or "OMP_NUM_THREADS" not in os.environ:  # torchrun itself sets the variable to 1 for several ranks
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)
