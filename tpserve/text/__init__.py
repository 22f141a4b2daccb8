"""Text: the tokenizer, chat templates, and the assembler that turns output ids into the text of a response."""
