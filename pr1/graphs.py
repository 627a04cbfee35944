"""CUDA graphs of a decoding step: a thousand small kernels launched as one."""

from __future__ import annotations

import torch

BUCKET = 16  # captured batch sizes are multiples of this up to 64, of twice this beyond


class Graphs:
    """CUDA graphs of `Engine.forward`, one per batch size, for each way of sampling.

    A graph holds addresses: of the engine's tensors, which never move, of the parameters, which optimizers write in
    place (looked at here: should one have moved, everything is captured anew), and of the small tensors of a call
    (stop ids, bans, members), which therefore are those of the first call with the same settings.
    """

    def __init__(self):
        self.addresses, self.plans, self.memory = None, {}, None
        self.stream = torch.cuda.Stream()  # of all warm-ups: cuBLAS keeps a workspace for every stream it has seen

    def open(self, engine) -> None:
        """Called once a run: puts the static tensors of earlier runs with the same settings in place."""
        addresses = [engine.weight.data_ptr(), *(p.data_ptr() for p in engine.policy.model.parameters())]
        if addresses != self.addresses:
            self.addresses, self.plans, self.memory = addresses, {}, torch.cuda.graph_pool_handle()
        s = engine.sampling
        key = (engine.group_size, s.temperature, s.top_p, s.top_k, s.min_new_tokens, engine.new_tokens, s.stop_ids)
        plan = self.plans.setdefault(key, (engine.attend, engine.stops, s, {}))
        engine.attend, engine.stops, engine.sampling, self.graphs = plan

    def replay(self, engine, n: int) -> None:
        """One more token for rows 0..n-1; the rows up to the captured size are done and stay as they are."""
        step = BUCKET if n <= 4 * BUCKET else 2 * BUCKET
        size = min(-(-n // step) * step, engine.rows)  # never by what earlier runs left of pools: resuming is bitwise
        if size not in self.graphs:
            self.graphs[size] = self._capture(engine, size)
        self.graphs[size].replay()

    def _capture(self, engine, size: int) -> torch.cuda.CUDAGraph:
        """While every row is done a step changes nothing that is read: the warm-up is harmless."""
        done = engine.done.clone()
        engine.done.fill_(True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                engine.forward(size)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            engine.forward(size)
        engine.done.copy_(done)
        return graph
