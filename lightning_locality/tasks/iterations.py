"""Many small iterations of an optimiser at the least cost."""

from __future__ import annotations

__all__ = ["Graph", "Iterations"]

from typing import Any, Literal, final

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_locality.optim import GradientFlow
from lightning_locality.tasks.objective import Objective

Graph = Literal["auto", "never"]
_WITH_CLOSURE = (GradientFlow, LBFGS)


@final
class Iterations:
    """Runs iterations: gradient, step, and nothing else.

    On CUDA, ``unroll`` iterations are recorded as a CUDA graph once, and replayed: a launch for all of them instead
    of some hundred for each. Where that cannot be done, it is said and the iterations run one by one.

    Args:
        objective: The loss.
        optimizer: Any optimiser of torch.
        graph: ``"never"`` to do without CUDA graphs.
        unroll: Iterations of a graph.
    """

    def __init__(self, objective: Objective, optimizer: Optimizer, graph: Graph, unroll: int) -> None:
        self.objective, self.optimizer, self.unroll = objective, optimizer, unroll
        self.graphed = graph == "auto" and self._can_be_recorded()
        self._graph: Any = None

    def _can_be_recorded(self) -> bool:
        cuda = all(weight.device.type == "cuda" for weight in self.objective.weights)
        return cuda and self.objective.batch_size is None and not isinstance(self.optimizer, _WITH_CLOSURE)

    def run(self, iteration: int, count: int) -> None:
        """Run ``count`` iterations from the given one."""
        end = iteration + count
        if self.graphed and count >= self.unroll:
            if self._graph is None:
                # what the first iterations set up (state of the optimiser, cuBLAS) must be there before
                self._warm_up(iteration)
                iteration += 1
                self._record(iteration)
            while self._graph is not None and iteration + self.unroll <= end:
                self._graph.replay()
                iteration += self.unroll
        self._one_by_one(iteration, end)

    def _one_by_one(self, start: int, end: int) -> None:
        optimizer, gradients, weights = self.optimizer, self.objective.gradients, self.objective.weights
        if isinstance(optimizer, _WITH_CLOSURE):
            for iteration in range(start, end):
                optimizer.step(lambda iteration=iteration: self._closure(iteration))  # type: ignore[misc]
            return
        for iteration in range(start, end):
            for weight, gradient in zip(weights, gradients(iteration), strict=True):
                weight.grad = gradient
            optimizer.step()

    def _closure(self, iteration: int) -> Tensor:
        gradients, value = self.objective.gradients_and_value(iteration)
        for weight, gradient in zip(self.objective.weights, gradients, strict=True):
            weight.grad = gradient
        return value

    def _warm_up(self, iteration: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._one_by_one(iteration, iteration + 1)
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, iteration: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._one_by_one(iteration, iteration + self.unroll)
            self._graph = graph
        except RuntimeError as error:
            self.graphed = False
            rank_zero_info(
                f"iterations run one by one: {type(self.optimizer).__name__} cannot be recorded as a CUDA graph "
                f"({str(error).splitlines()[0]}); torch's own optimisers can be with capturable=True"
            )
