"""What one does with a student: other formats, what it costs and what it is worth."""
