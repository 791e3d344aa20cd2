"""One page about a machine: what is installed, what really works, and the cure for what does not."""
