"""How a model writes its answers: reasoning, content and tool calls; the parser of such text and the grammar of it."""
