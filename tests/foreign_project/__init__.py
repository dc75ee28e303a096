"""What a stranger writes who starts a project from this one: letters in colour, 40 pixels a side; and odd classes."""
