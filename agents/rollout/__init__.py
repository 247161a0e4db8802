"""How episodes are made with a policy: by stepping the env, or from whole texts that an engine
writes."""
