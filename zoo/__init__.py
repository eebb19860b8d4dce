"""The field's methods and networks, and the suites that run them side by side."""
