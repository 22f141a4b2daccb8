"""Floor 0: the structs that flow between processes. msgspec and plain Python only; nothing here has behaviour worth a mock."""
