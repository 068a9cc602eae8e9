"""A user's callback during training."""

import weakref
from collections.abc import Callable
from typing import Any

from rlamort.env import Episode
from rlamort.errors import UserError
from rlamort.train import Enough, Pace, Values

Callback = Callable[[Any], Any]  # takes the learner; returns False to stop learning


class Called:
    """A tracker that calls the callback after every record, evaluation and checkpoint.

    Args:
        callback: the function, if there is one.
        learner: its argument.

    Raises:
        UserError: it is not callable.
    """

    def __init__(self, callback: Callback | None, learner: Any) -> None:
        if callback is not None and not callable(callback):
            raise UserError(
                f"callback: a {type(callback).__name__} is given; a function that takes the learner is needed "
                f"(Stable-Baselines3's callbacks belong to its own loop)"
            )
        self.callback, self.enough = callback, False
        self.learner = weakref.ref(learner)  # who holds this, so that neither keeps the other alive

    def __call__(self) -> None:
        if self.callback is not None and self.callback(self.learner()) is False:
            self.enough = True

    def record(self, env_step: int, values: Values) -> None:
        """As `Tracker.record`: losses, or an evaluation."""
        learner = self.learner()
        assert learner is not None, "it is learning"
        learner.latest = dict(values)
        self()

    def progress(self, env_step: int, pace: Pace, episode: Episode | None) -> None:
        """As `Tracker.progress`."""

    def stop_if_asked(self) -> None:
        """Raises Enough if the callback has returned False."""
        if self.enough:
            raise Enough
