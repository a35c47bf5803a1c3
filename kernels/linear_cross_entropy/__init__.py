"""Cross-entropy of ``hidden @ weight.T`` without ever holding all logits."""
