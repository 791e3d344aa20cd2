"""Runs that stop, fail or hang: together, with what is needed to go on, and with words that say why."""
