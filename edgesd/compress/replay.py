"""Recorded calls sent through a module side by side, halting together at chosen layers.

Each lane (one batch of calls, one module) runs in a thread of its own, but only one lane moves at a time: a thread is
just a call that can be left in the middle of a forward pass nobody wrote for it. While all lanes wait before a layer,
the layers that are still ahead of them may change: that is how a whole network is pruned in one pass, every layer
seeing what the layers before it became. Memory: what the forward passes themselves keep alive, times the lanes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

Forward = Callable[[nn.Module], object]


@dataclass
class Halt:
    """A lane waiting before a layer. x: the layer's input, which may be replaced. seen: inputs of watched modules."""

    name: str
    x: torch.Tensor
    seen: dict[str, torch.Tensor] = field(default_factory=dict)


class _Left(BaseException):
    """Ends a lane that is no longer wanted; not an Exception, so that no forward pass swallows it."""


class _Lane(threading.Thread):
    def __init__(self, module: nn.Module, forward: Forward) -> None:
        super().__init__(daemon=True)
        self.module, self.forward_pass = module, forward
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.halt: Halt | None = None
        self.error: BaseException | None = None
        self.leave = False
        self.seen: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        self.go.acquire()
        _here.lane = self
        try:
            if not self.leave:
                with torch.no_grad():
                    self.forward_pass(self.module)
        except _Left:
            pass
        except BaseException as error:
            self.error = error
        self.halt = None
        self.seen.clear()
        self.stopped.release()

    def advance(self) -> Halt | None:
        """Runs to the next halt; None at the end."""
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error
        return self.halt

    def wait(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.halt = Halt(name, x, self.seen)
        self.stopped.release()
        del x
        self.go.acquire()
        if self.leave:
            raise _Left
        x = self.halt.x
        del self.halt.x  # whoever still holds the halt does not hold the tensor
        return x


_here = threading.local()


def lockstep(
    lanes: Sequence[tuple[nn.Module, Forward]], stops: Collection[str], watched: Collection[str] = ()
) -> Iterator[list[Halt]]:
    """Yields, for each stop in the order of execution, one Halt per lane; the lanes go on when the next is asked for.

    lanes: (module, call that runs it); modules may differ between lanes but must pass the same stops in the same order.
    watched: modules whose latest first input a Halt shows. Errors in a forward pass are raised here.
    """
    threads = [_Lane(module, forward) for module, forward in lanes]
    with ExitStack() as hooks:
        for module in {id(m): m for m, _ in lanes}.values():
            for name in watched:
                hooks.enter_context(_hook(module, name, _remember))
            for name in stops:
                hooks.enter_context(_hook(module, name, _stop))
        try:
            for thread in threads:
                thread.start()
            halts = [thread.advance() for thread in threads]
            while halts[0] is not None:
                yield halts  # type: ignore[misc]  # all lanes pass the same stops
                halts = [thread.advance() for thread in threads]
        finally:
            for thread in threads:
                thread.leave = True
                thread.go.release()
                thread.join()


def _hook(module: nn.Module, name: str, act: Callable) -> torch.utils.hooks.RemovableHandle:
    return module.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs, name=name: act(name, args, kwargs), with_kwargs=True
    )


def _remember(name: str, args: tuple, kwargs: dict) -> None:
    if (lane := getattr(_here, "lane", None)) is not None:
        lane.seen[name] = args[0] if args else kwargs["hidden_states"]


def _stop(name: str, args: tuple, kwargs: dict) -> tuple | None:
    lane = getattr(_here, "lane", None)
    if lane is None:  # the layer is being run by whoever holds the lanes
        return None
    return (lane.wait(name, args[0]), *args[1:]), kwargs
