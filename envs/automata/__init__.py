"""Tasks whose reward is a weighted automaton, and their exact optimum."""
