"""The built-in model: a small Llama that speaks of the harbour village Tidewick. Needs no download.

Owns the model directory (`model/`) and the programs that made it: `world` holds the facts, `stories` and `dialogues` make
text of them, `train` makes a tokenizer and a model of the text. Serving imports only this file; it loads nothing.
"""

from pathlib import Path

NAME = "tidewick"


def path() -> Path:
    """The model directory."""
    return Path(__file__).with_name("model")
