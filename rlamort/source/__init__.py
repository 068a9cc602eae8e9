"""p(x), where an agent's contexts come from."""

from rlamort.source.base import Batch, Collected, Contexts, Labelled
from rlamort.source.contexts import Fresh, Labels
from rlamort.source.replay import Replay, bytes_per_frame

__all__ = ["Batch", "Collected", "Contexts", "Fresh", "Labelled", "Labels", "Replay", "bytes_per_frame"]
