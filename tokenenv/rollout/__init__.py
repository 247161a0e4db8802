"""Engines that write whole texts for agents with `rollout=`: vLLM in this process, and vLLM on a
server."""
