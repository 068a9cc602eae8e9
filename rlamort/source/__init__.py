"""p(x), where an agent's contexts come from."""

from rlamort.source.base import Batch, Collected, Contexts, Labelled
from rlamort.source.contexts import Fresh, Labels, Unattended
from rlamort.source.demonstrations import Demonstrations
from rlamort.source.replay import Replay, bytes_per_frame
from rlamort.source.rollouts import Played, Rollouts

__all__ = [
    "Batch", "Collected", "Contexts", "Demonstrations", "Fresh", "Labelled", "Labels", "Played", "Replay", "Rollouts",
    "Unattended", "bytes_per_frame",
]  # fmt: skip
