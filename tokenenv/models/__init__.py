"""Language and reward models: trunks that run N texts side by side in slots, each with a cache, and
heads that read their states."""
