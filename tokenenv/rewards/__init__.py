"""Reward terms: what each token is paid, and why."""
