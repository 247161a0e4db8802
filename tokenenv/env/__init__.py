"""The environment: N running texts, one token a step, and what each token is paid."""
