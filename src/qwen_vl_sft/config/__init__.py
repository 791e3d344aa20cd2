"""Read recipes and command lines into typed settings."""
