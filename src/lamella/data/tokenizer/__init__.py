"""Text to token ids and back: the pieces of a sentencepiece model, or of a Hugging Face tokenizer.json."""

from lamella.data.tokenizer.base import Tokenizer
from lamella.data.tokenizer.model import FILES, Model, load, read_model

__all__ = ["FILES", "Model", "Tokenizer", "load", "read_model"]
