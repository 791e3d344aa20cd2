"""What measures this package and what makes models for tests; nothing that trains or evaluates imports it."""
