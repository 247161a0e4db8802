"""The bundled tasks, one file each; each has a function `task` that a registered id names."""
