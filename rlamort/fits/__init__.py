"""Models that are learned from all transitions, outside captured updates."""
