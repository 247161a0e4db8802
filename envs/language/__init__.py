"""Text that the tasks are made of: grammars, metrics, splits, and the bundled language models."""
