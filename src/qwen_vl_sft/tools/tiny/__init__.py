"""Build the embedded tiny model and its charts."""
