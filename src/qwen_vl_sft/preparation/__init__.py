"""What happens between reading a recipe and the first step: rules, rows, image features, the plan, the resume."""
