"""Builder of the embedded tiny model and its charts."""
