"""The machine and its files: cores, memory, generator state, atomic writes."""
