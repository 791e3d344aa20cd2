"""TRL's trainer around model and data: built, run and measured."""
