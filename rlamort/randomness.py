"""Where a run's random numbers come from."""

import contextlib
from collections.abc import Iterator

import torch


class Randomness:
    """A stream of torch's global generator of its own, so that what runs beside a learner neither moves it nor is moved."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.running = False
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(seed)
            self.states = self._read()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            self.running = True
            try:
                yield
            finally:
                self.states = self._read()
                self.running = False

    def current(self) -> list[torch.Tensor]:
        """Where the stream is now."""
        return self._read() if self.running else self.states

    def _read(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]
