"""The HTTP front end: OpenAI's endpoints over an engine in a process of its own."""
