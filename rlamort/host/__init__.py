"""What the process and its files share: cores, memory, generators, folders that appear whole."""
