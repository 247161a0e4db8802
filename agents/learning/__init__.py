"""From finished episodes to gradients: the policy, its log-probs, advantages and losses."""
