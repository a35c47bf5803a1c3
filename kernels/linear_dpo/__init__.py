"""Direct preference optimisation from hidden states: the linear cross-entropy's sibling, without holding all logits."""
