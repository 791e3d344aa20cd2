"""How fast training is: variants side by side in one process, and one recipe on every strategy."""
