"""The built-in model: a small Llama trained on stories about the harbour village Tidewick. Needs no download.

Owns the model directory (`model/`) and the programs that create it: `world` contains the facts, `stories` and `dialogues`
generate text from them, `train` trains a tokenizer and a model on the text. Serving imports only this file, which loads nothing.
"""

from pathlib import Path

NAME = "tidewick"


def path() -> Path:
    """The model directory."""
    return Path(__file__).with_name("model")
