"""An example of a tokenenv plugin: one task, one reward design, one algorithm."""
