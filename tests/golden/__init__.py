"""Numbers that code elsewhere gave, with their provenance, and the weights that it gave them for."""
