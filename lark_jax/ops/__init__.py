"""Vocabulary mathematics without logits: token statistics, the weighted loss, and the float64 reference."""
