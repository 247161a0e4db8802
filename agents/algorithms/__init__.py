"""The algorithms, one file each, and what several of them share (`policy_gradient`, `groups`)."""
