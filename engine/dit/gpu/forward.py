"""`FusedForward`: a transformer's forward through fused kernels, as a CUDA graph a shape; or the reason why not."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ....quant import UnsupportedError, WeightSlot
from ..linears import Linears
from .flux import FusedFlux

FORWARDS = {forward.TRANSFORMER: forward for forward in (FusedFlux,)}
MOST_GRAPHS = 8

log = logging.getLogger("rollmill")


class FusedForward:
    """Computes what the module's own forward computes, within BF16's roundings; one call at a time.

    It leaves calls to the module that ask for more than a velocity (control nets, adapters), for activations as they
    are, or for every layer's input (calibration, clipping).
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[tuple[str, ...], Linears],
        slots: Sequence[WeightSlot],
        *,
        graphs: bool,
    ) -> None:
        self.module, self._linears, self._slots, self._wants_graphs = module, linears, slots, graphs
        self._made: dict[str, FusedFlux | str] = {}
        self._graphs: dict[tuple[Any, ...], ForwardGraph] = {}
        self._place: Any = None  # of all graphs: pool and stream, for what a replay uses nobody needs after it

    def forget_graphs(self) -> None:
        """Give their memory back."""
        self._graphs.clear()
        self._place = None

    def __call__(self, precision: str, inputs: Mapping[str, Any]) -> Tensor | None:
        """The velocity for the keywords of a forward; None where the module's own forward must serve."""
        given = {name: value for name, value in inputs.items() if value is not None and name != "return_dict"}
        made = self._at(precision)
        reason = made if isinstance(made, str) else made.unsupported(given)
        if isinstance(made, str) or reason is not None:
            _log_reason(type(self.module).__name__, precision, str(reason))
            return None
        with torch.no_grad():
            return self._run(made, precision, given)

    def reason(self, precision: str) -> str | None:
        """Why no forward in `precision` is fused, or None; a single call may have reasons of its own."""
        made = self._at(precision)
        return made if isinstance(made, str) else None

    def _at(self, precision: str) -> FusedFlux | str:
        if precision not in self._made:
            self._made[precision] = self._make(precision)
        return self._made[precision]

    def _make(self, precision: str) -> FusedFlux | str:
        kind = FORWARDS.get(type(self.module).__name__)
        if precision == "weight_only":
            return "activations are to stay as they are"
        if kind is None:
            return f"only {', '.join(FORWARDS)} has fused kernels"
        try:
            return kind(self.module, self._linears, precision)
        except UnsupportedError as error:
            return str(error)

    def _run(self, forward: FusedFlux, precision: str, given: Mapping[str, Tensor]) -> Tensor:
        if not self._wants_graphs:
            return forward(**given)
        key = (precision, *((name, value.shape, value.dtype) for name, value in sorted(given.items())))
        addresses = tuple(tensor.data_ptr() for slot in self._slots for tensor in slot.tensors.values())
        graph = self._graphs.get(key)
        if graph is None or graph.addresses != addresses:  # what it reads has moved
            graph = self._graphs[key] = self._capture(forward, precision, given, addresses)
        return graph.run(given)

    def _capture(
        self, forward: FusedFlux, precision: str, given: Mapping[str, Tensor], addresses: tuple[int, ...]
    ) -> ForwardGraph:
        start = time.perf_counter()
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        if not self._graphs:  # a pool that no graph uses any more takes no other, and lends memory in one stream only
            device = given["hidden_states"].device
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        graph = ForwardGraph(forward, given, addresses, *self._place)
        shape = list(given["hidden_states"].shape)
        log.info("captured a forward in %s, latents %s, in %.1f s", precision, shape, time.perf_counter() - start)
        return graph


class ForwardGraph:
    """One precision and shape. Swaps write packed tensors in place: it stays valid."""

    def __init__(
        self, forward: FusedFlux, given: Mapping[str, Tensor], addresses: tuple[int, ...], pool: Any, stream: Any
    ) -> None:
        self.addresses = addresses
        self.inputs = {name: value.clone() for name, value in given.items()}
        self.graph = torch.cuda.CUDAGraph()
        caller = torch.cuda.current_stream(given["hidden_states"].device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            forward(**self.inputs)  # compiles what compiles on first use
        caller.wait_stream(stream)
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.velocity = forward(**self.inputs)

    def run(self, given: Mapping[str, Tensor]) -> Tensor:
        for name, value in given.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.velocity.clone()


@cache
def _log_reason(model: str, precision: str, reason: str) -> None:
    """Say once why a forward goes layer by layer."""
    log.info("%s in %s, layer by layer: %s", model, precision, reason)
