"""What the agent changes on its host, and how it is undone."""
