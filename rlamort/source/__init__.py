"""p(x), where an agent's contexts come from."""

from rlamort.source.base import Batch, Collected, Contexts
from rlamort.source.contexts import Fresh
from rlamort.source.replay import Replay, bytes_per_frame

__all__ = ["Batch", "Collected", "Contexts", "Fresh", "Replay", "bytes_per_frame"]
