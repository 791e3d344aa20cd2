"""Handle runs that are stopped, fail or hang: signals, deadlines, faults, the watchdog."""
