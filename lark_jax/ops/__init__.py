"""Operations over the vocabulary that never hold all logits: per-token statistics and the weighted loss."""
