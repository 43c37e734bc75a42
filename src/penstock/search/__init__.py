"""Test-time search: programs that spend a budget over the engine, on generations that can be extended and forked."""
