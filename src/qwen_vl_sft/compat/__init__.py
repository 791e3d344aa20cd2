"""Changes made to libraries at run time."""
