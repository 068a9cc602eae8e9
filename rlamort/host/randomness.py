"""A run's generator state."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A context with torch's generators of a device seeded; their state is restored at its end. Quicker than `Randomness`."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which moves every GPU's generator too
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class Randomness:
    """Isolates a run's state of the global generators of torch, NumPy and Python.

    As a context it swaps the run's state in, from which environments and problems may draw, too, and restores the outer state
    at its end. So a seed determines a run, and other code in the process neither affects it nor is affected.

    Args:
        seed: of all generators.
        device: of the run; a GPU has its own generator.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.running = False
        outside = self._read()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self.states = self._read()
        self._write(outside)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.running:
            yield
            return
        outside = self._read()
        self._write(self.states)
        self.running = True
        try:
            yield
        finally:
            self.states = self._read()
            self.running = False
            self._write(outside)

    @contextlib.contextmanager
    def of_torch(self) -> Iterator[None]:
        """A context with the run's state of torch's generators only, for acting."""
        if self.running:
            yield
            return
        with torch.random.fork_rng(self.devices):
            self._write_torch(self.states["torch"])
            try:
                yield
            finally:
                self.states["torch"] = self._read_torch()

    def current(self) -> dict[str, Any]:
        """The run's present generator state."""
        return self._read() if self.running else self.states

    def _read(self) -> dict[str, Any]:
        return {"torch": self._read_torch(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}

    def _write(self, states: dict[str, Any]) -> None:
        self._write_torch(states["torch"])
        np.random.set_state(states["numpy"])
        version, words, gauss = states["python"]  # lists, where they come from a file
        random.setstate((version, tuple(words), gauss))

    def _read_torch(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def _write_torch(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
