"""A run on disk and on a screen: checkpoints, TensorBoard, episodes, the page, evaluation,
export."""
