"""Serve what a run produces with the engines that people use, and compare their answers with this package's."""
