"""Text to token ids and back: the tokenizer, the chat template, the stream. Knows no models."""
