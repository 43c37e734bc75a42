"""The bodies of requests, as far as they are understood here."""
