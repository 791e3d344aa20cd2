"""Publish on the Hub: files, model card, push, and comparison afterwards."""
