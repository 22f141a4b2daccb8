"""Floor 0: the structs that processes exchange. Uses only msgspec and the standard library, and holds no behaviour."""
