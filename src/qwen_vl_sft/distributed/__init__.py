"""The world a run was launched into: what was asked for, what was found, started and checked."""
