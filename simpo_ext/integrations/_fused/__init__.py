"""Token log-probabilities for the integrations from hidden states and lm_head, without logits."""
