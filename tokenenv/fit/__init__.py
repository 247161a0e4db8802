"""Token-level reward models, trained from what people have: preferences, scores, labels, texts."""
