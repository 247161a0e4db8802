"""From a policy to finished episodes: by stepping the env, or from whole texts that an engine
writes."""
