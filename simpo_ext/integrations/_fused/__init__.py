"""How the integrations score tokens from hidden states and lm_head, without logits."""
