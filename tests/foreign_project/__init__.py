"""What a stranger writes who starts a project from this one: letters instead of digits, in colour, 40 pixels a side."""
