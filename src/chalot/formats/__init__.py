"""Files to tensors and back. Knows no models."""
