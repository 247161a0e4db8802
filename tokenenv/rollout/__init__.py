"""Engines that write whole texts, for agents with `rollout=`: vLLM in this process, and on a
server."""
