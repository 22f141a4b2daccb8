"""Text: the tokenizer, chat templates, and the assembler that turns an output's ids into what a client sees."""
